"""Tiny Hugging Face checkpoints, written by transformers itself: the PyTorch side of the tests."""

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import BOS, EOS, PAD, VOCABULARY, write_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
FAMILY: dict[str, dict[str, Any]] = {
    "Gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def write_hf(directory: Path, architecture: str, seed: int = 0, **changes: Any) -> Any:
    """Write a random fp32 model with every tensor, biases and norms included, away from its
    initial value; return it."""
    model_class = getattr(transformers, architecture)
    shape = {**SHAPE, **FAMILY.get(architecture[:5], {})}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**{**shape, **changes})).eval()
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    for module in model.modules():
        # mlx-lm's gemma computes the exact GELU where transformers takes the tanh approximation of
        # it: 1e-4 in a log-prob, which is no matter of conversion
        if isinstance(module, transformers.activations.GELUTanh):
            module.act = torch.nn.functional.gelu
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


def torch_logps(model: Any, tokens: list[int]) -> list[float]:
    """Log-prob of each token but the first."""
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    return [logp_TV[t, token].item() for t, token in enumerate(tokens[1:])]


def torch_score(model: Any, tokens: list[int]) -> float:
    """The reward transformers computes for one sequence."""
    with torch.no_grad():
        return float(model(torch.tensor([tokens])).logits[0, 0])
