"""Configurations of tiny mixtures of experts; the rest comes from `tiny_config`."""

from typing import Any

import pytest

from mlx_grpo.backend.device import device_name
from mlx_grpo.backend.precision import asked
from tests.helpers.tiny import BOS, EOS, PAD, VOCABULARY, model_of

WIDTH, EXPERTS, CHOSEN, INNER = 64, 4, 2, 64

COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
QWEN = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": INNER,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN,
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": INNER},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
    "olmoe": {**QWEN, "num_key_value_heads": 4},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "sliding_window": 8,
        "rope_scaling": {"rope_type": "default"},
    },
    "granitemoe": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
    },
    "deepseek_v3": {**DEEPSEEK, **LATENT},
    "glm4_moe": {
        **DEEPSEEK,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
    },
}


def mixture_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny mixture of experts."""
    return {**COMMON, "model_type": family, **MIXTURES[family], **changes}


def tiny_mixture(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random mixture in fp32, frozen, whose routers have a preference."""
    return model_of(mixture_config(family, **changes), seed)


def skip_without_kernel(family: str, packed: bool = True) -> None:
    """Of what MLX has no kernel for: on CUDA quantized products with another weight for each head,
    on a CPU experts that are neither quantized nor fp32."""
    if packed and family.startswith("deepseek") and device_name() == "cuda":
        pytest.skip("this backend has no kernel for quantized latent attention")
    if not packed and device_name() == "cpu" and asked().dtype in ("bf16", "fp16"):
        pytest.skip("this backend multiplies experts that are not quantized in fp32 alone")
