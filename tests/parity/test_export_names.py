"""Names of weights in mlx-lm and in transformers, family by family: what exports rely on."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.export.names import SAME_LAYERS, SAME_WEIGHTS, check_peft, note_on_transformers
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.safetensors import load_arrays
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.lora import add_lora, lora_parameters
from tests.helpers.popular import POPULAR
from tests.helpers.variants import VARIANTS, write_variant

EVERY = {**VARIANTS, **POPULAR}
LESS_PLAIN = (
    "glm partial 1",
    "gemma3 multimodal",
    "gemma4 experts",
    "gemma4 multimodal",
    "mistral3, theta 1e9",
    "qwen3_vl, theta 5e6",
)
NAMES = [name for name in EVERY if " " not in name and name not in ("glm", "gemma4")]


@pytest.mark.parametrize("name", [*NAMES, *LESS_PLAIN])
def test_the_lists_hold_what_has_the_same_names_in_transformers(name: str, tmp_path: Path) -> None:
    model = write_variant(tmp_path / "hf", EVERY[name])
    there = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    sft = tmp_path / "sft"
    try:
        convert_sft(locate(str(tmp_path / "hf")), sft, Quantization(16), None)
    except InputError:  # what is not converted is not exported either
        assert read_json(tmp_path / "hf" / "config.json")["model_type"] not in SAME_LAYERS
        return
    family = read_json(sft / "config.json")["model_type"]
    weights = {n: v.shape for n, v in load_arrays(sft / "model.safetensors").items()}
    adapted = add_lora(load_backbone(sft).model, rank=2, scale=1.0, seed=0)
    flat = [n for n, value in lora_parameters(adapted).items() if value.ndim == 2]
    layers = {f"{n.rpartition('.')[0]}.weight" for n in flat}
    assert layers <= weights.keys()
    assert (family in SAME_WEIGHTS) == all(there.get(n) == weights[n] for n in weights)
    assert (family in SAME_LAYERS) == all(there.get(n) == weights[n] for n in layers)
    assert bool(note_on_transformers(sft)) == (family not in SAME_WEIGHTS)
    if family in SAME_LAYERS:
        check_peft(sft)
    else:
        with pytest.raises(InputError, match=f"model type '{family}' .*use --fuse"):
            check_peft(sft)


def test_every_listed_family_is_tried() -> None:
    tried = {name.split()[0].rstrip(",") for name in (*NAMES, *LESS_PLAIN)}
    aliases = {"hunyuan_v1_dense": "hunyuan_dense", "gemma4_text": "gemma4"}
    assert {aliases.get(family, family) for family in SAME_LAYERS} <= tried
