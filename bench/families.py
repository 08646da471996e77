"""Configurations of small random models of nine families, for tests and benchmarks."""

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gemma": {"num_hidden_layers": 2, "num_key_value_heads": 1},
    "gemma2": {"num_hidden_layers": 2, "num_key_value_heads": 2},
    "gemma3_text": {"num_hidden_layers": 7, "num_key_value_heads": 1, "sliding_window": 8},
    "phi3": {"num_hidden_layers": 2, "num_key_value_heads": 2},
    "granite": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
}


def family_config(family: str, hidden_size: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    """config.json of a model of the family with four heads."""
    return {
        "model_type": family,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 4,
        "head_dim": hidden_size // 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        **FAMILIES[family],
        **more,
    }
