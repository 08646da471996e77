"""Shapes of real models, for benchmarks with random weights."""

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_grpo.backend.precision import apply_precision, choose_precision
from mlx_grpo.core.rng import key
from mlx_grpo.models.lora import lora_parameters, set_parameters

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_QWEN2 = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 1e5,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 5e5,
    },
    "llama-3.2-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 5e5,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "qwen2.5-14b": {
        **_QWEN2,
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "qwen2.5-32b": {
        **_QWEN2,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "num_hidden_layers": 18,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    },
    "granite-3.1-1b-a400m": {
        "model_type": "granitemoe",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 49155,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "qwen3.5-0.8b": {  # the text part; three blocks of four have a gated delta rule
        "model_type": "qwen3_5",
        "text_config": {
            "model_type": "qwen3_5_text",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "intermediate_size": 3584,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "num_experts": 0,
            "vocab_size": 248320,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    },
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rope_theta": 1e4,
    },
}


def shape_config(shape: str, depth: int = 0) -> dict[str, Any]:
    """Configuration of a shape with so many blocks; 0 means as many as it has."""
    config, fewer = SHAPES[shape], {"num_hidden_layers": depth} if depth else {}
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | fewer}
    return config | fewer


def decoder_fields(shape: str) -> dict[str, Any]:
    """The fields of a shape's decoder, wherever its configuration has them."""
    config = SHAPES[shape]
    found: dict[str, Any] = config.get("text_config", config)
    return found


def move_lora(actor: nn.Module, size: float, seed: int) -> None:
    """Let a fresh LoRA leave its starting point: B is drawn, A stays."""
    drawn = {
        n: size * mx.random.normal(v.shape, key=key(seed, n))
        for n, v in lora_parameters(actor).items()
        if n.endswith("lora_b")
    }
    set_parameters(actor, drawn)


class NoTokenizer:
    """For rollouts whose texts nobody reads."""

    def decode(self, ids: list[int]) -> str:
        return ""


def random_model(shape: str) -> nn.Module:
    """A frozen model of the shape with random weights, in the form this machine trains with: 4-bit
    on a GPU, dense fp32 on a CPU."""
    mx.random.seed(0)
    model_class, args_class = _get_classes(SHAPES[shape])
    model = model_class(args_class.from_dict(SHAPES[shape]))
    policy = choose_precision(sum(v.size for _, v in tree_flatten(model.parameters())))
    if policy.device == "cpu" and not policy.dense:
        sys.exit(f"{shape}: too large for this machine's memory as fp32; choose a smaller --shape")
    if not policy.dense:
        model.set_dtype(policy.dtype)
        nn.quantize(model, group_size=64, bits=4)
    apply_precision(model, policy)
    model.freeze()
    return model
