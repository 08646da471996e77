"""Layers that a family quantizes in its own way, or that no group divides: whatever is written can
be loaded, here and in mlx-lm."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization, how_quantized
from mlx_grpo.convert.source import locate
from mlx_grpo.models.directory import load_lazily, parameter_count
from tests.helpers.mixtures import mixture_config
from tests.helpers.predicates import families_with, own_predicates
from tests.helpers.tiny import write_model_of

TOKENS = mx.array([[257, 60, 61, 62, 63]])
TARGETS = [Quantization(bits, group) for bits in (4, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize("family", families_with("quant_predicate"))
def test_each_layer_with_a_way_of_its_own_can_be_quantized_whatever_its_width(family: str) -> None:
    for predicate, parts in own_predicates(family, "quant_predicate"):
        for path in (f"model.layers.1.{part}" for part in parts):
            for target in TARGETS:
                for width in (48, 96, 128, 320):
                    layer = nn.Linear(width, 8, bias=False)
                    wanted = predicate(path, layer)
                    found = how_quantized(wanted, layer, target)
                    assert isinstance(found, bool) or found.keys() >= {"group_size", "bits"}
                    if isinstance(found, dict):
                        packed = layer.to_quantized(**found)
                        assert packed.bits == wanted.get("bits", target.bits)
                    assert bool(found) == (bool(wanted) and width % 32 == 0)


def test_a_group_of_the_family_that_does_not_divide_becomes_a_smaller_one() -> None:
    def found(width: int, group: int) -> object:
        layer = SimpleNamespace(weight=mx.zeros((8, width)))
        return how_quantized({"group_size": group, "bits": 8}, layer, Quantization(4, 32))

    assert found(96, 64) == {"group_size": 32, "bits": 8}
    assert found(192, 128) == {"group_size": 64, "bits": 8}
    assert found(128, 64) == {"group_size": 64, "bits": 8}
    assert found(48, 64) is False


@pytest.mark.parametrize("changes", ({"hidden_size": 96}, {"moe_intermediate_size": 48}))
@pytest.mark.parametrize("family", ("qwen3_moe", "glm4_moe"))
def test_what_is_written_loads_here_and_in_mlx_lm(
    family: str, changes: dict[str, int], tmp_path: Path
) -> None:
    config = mixture_config(family, max_position_embeddings=4096, **changes)
    source = write_model_of(tmp_path / "source", config)
    convert_sft(locate(str(source)), tmp_path / "out", Quantization(4, 32), None)
    ours, (theirs, _) = load_lazily(tmp_path / "out")[0], load_model(tmp_path / "out")
    for model in (ours, theirs):
        model.set_dtype(mx.float32)  # MLX's CPU backend computes experts in nothing else
    assert mx.array_equal(ours(TOKENS), theirs(TOKENS)).item()
    assert parameter_count(tmp_path / "out") == parameter_count(source)
    own = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    whole = [name for name, choice in own.items() if choice is False]
    assert any("down_proj" in name for name in whole) == ("moe_intermediate_size" in changes)
