"""Tiny Hugging Face checkpoints, written by transformers itself: the PyTorch side of the tests."""

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
import transformers

from mlx_grpo.files.safetensors import load_arrays
from mlx_grpo.models.backbone import load_backbone
from tests.helpers.tiny import BOS, EOS, PAD, VOCABULARY, write_tokenizer

TOKENS = [BOS, *((7 * i * i + 3 * i) % 256 for i in range(24))]

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
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    # mlx-lm rounds the scale of the embedding, sqrt(hidden), to bf16: of 64 it is exact
    "Gemma3": {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 8},
}


def write_hf(directory: Path, architecture: str, seed: int = 0, **changes: Any) -> Any:
    """Write a random bf16 model with every tensor, biases and norms included, away from its
    initial value; return it."""
    model_class = getattr(transformers, architecture)
    family = next((f for f in reversed(FAMILY) if architecture.startswith(f)), "")
    shape = {**SHAPE, **FAMILY.get(family, {}), "attn_implementation": "eager"}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**{**shape, **changes})).eval()
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
            parameter.copy_(parameter.bfloat16())  # written in 16 bits, scored in 32
    for module in model.modules():
        # mlx-lm's gemma computes the exact GELU where transformers takes the tanh approximation of
        # it: 1e-4 in a log-prob, which is no matter of conversion
        if family == "Gemma" and isinstance(module, transformers.activations.GELUTanh):
            module.act = torch.nn.functional.gelu
    save_hf(model, directory)
    write_tokenizer(directory)
    return model


def save_hf(model: Any, directory: Path, **how: Any) -> None:
    """Write a model in bf16, as transformers does."""
    copy.deepcopy(model).bfloat16().save_pretrained(directory, **how)


def torch_logps(model: Any, tokens: list[int]) -> list[float]:
    """Log-prob of each token but the first."""
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    return [logp_TV[t, token].item() for t, token in enumerate(tokens[1:])]


def torch_score(model: Any, tokens: list[int]) -> float:
    """The reward transformers computes for one sequence."""
    with torch.no_grad():
        return float(model(torch.tensor([tokens])).logits[0, 0])


def found_logps(directory: Path, tokens: list[int] = TOKENS) -> list[float]:
    """Log-prob of each token but the first under a converted directory, in fp32."""
    logits_TV = load_backbone(directory).model(mx.array([tokens]))[0]
    logp_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
    return [logp_TV[t, token].item() for t, token in enumerate(tokens[1:])]


def widest(a: list[float], b: list[float]) -> float:
    """Largest absolute difference."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def load_dequantized(model: Any, directory: Path) -> None:
    """Put the values that a quantized directory stands for into a torch model."""
    arrays = load_arrays(directory / "model.safetensors")
    values = {}
    for name, value in arrays.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in arrays and name == f"{stem}.weight":
            scales, biases = (
                arrays[f"{stem}.{s}"].astype(mx.float32) for s in ("scales", "biases")
            )
            value = mx.dequantize(value, scales, biases, group_size=32, bits=4)
        if not name.endswith((".scales", ".biases")):
            values[name] = torch.tensor(value.astype(mx.float32).tolist())
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight", "score.weight"}
