"""Of which families mlx-lm's names are those of transformers.

mlx-lm renames, turns and stacks tensors when it loads a model. An export keeps what it finds there.
transformers and PEFT only warn of a name they do not know: they fill the place that stays empty
with random values, or leave the adapter out.
"""

from pathlib import Path

from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import read_json

SAME_WEIGHTS = frozenset(
    {
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral3",
        "mistral",
        "nemotron",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""Families of which every weight has the name and the shape it has in transformers."""
SAME_LAYERS = SAME_WEIGHTS | frozenset(
    {
        "afmoe",
        "apertus",
        "deepseek_v3",
        "dots1",
        "falcon_h1",
        "gemma4_text",
        "glm4_moe",
        "gpt_oss",
        "granitemoe",
        "granitemoehybrid",
        "jamba",
        "lfm2",
        "mamba",
        "mamba2",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Families of which at least the linear layers that a LoRA takes have; their experts, convolutions
or gates have not. `tests/parity/test_export_names.py` holds both against transformers."""


def check_peft(sft: Path) -> None:
    """Raise InputError unless PEFT finds the layers of an adapter of this model."""
    family = _family(sft)
    if family not in SAME_LAYERS:
        raise InputError(
            f"--peft: PEFT looks layers up by transformers' names, and mlx-lm's are not known to "
            f"be the same for model type '{family}' ({sft}); use --fuse"
        )


def note_on_transformers(sft: Path) -> str:
    """What to know of a 16-bit export of this model; empty if transformers loads it."""
    family = _family(sft)
    if family in SAME_WEIGHTS:
        return ""
    return (
        f"load this model with mlx-lm, not with transformers: weights of model type '{family}' "
        "are not known to have the same names there, and a weight that is not found becomes random"
    )


def _family(sft: Path) -> str:
    return str(read_json(sft / "config.json").get("model_type"))
