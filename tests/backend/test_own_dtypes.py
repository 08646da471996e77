"""What a family keeps in fp32 stays so when the rest is cast to 16 bits: biases that choose
experts, decay rates."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_grpo.backend.own_dtypes import may_cast
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.rng import key
from mlx_grpo.models.directory import load_lazily
from tests.helpers.mixtures import mixture_config, skip_without_kernel, tiny_mixture
from tests.helpers.predicates import families_with, own_predicates
from tests.helpers.tiny import write_model_of

BIAS = "mlp.gate.e_score_correction_bias"
FAMILIES = ("deepseek_v3", "glm4_moe")
HALVES = (mx.bfloat16, mx.float16)


def dtypes(model: nn.Module) -> dict[str, mx.Dtype]:
    return {name: value.dtype for name, value in tree_flatten(model.parameters())}


@pytest.mark.parametrize("family", families_with("cast_predicate"))
def test_a_name_within_a_block_is_judged_as_the_whole_name(family: str) -> None:
    for predicate, parts in own_predicates(family, "cast_predicate"):
        assert parts, family
        for part in parts:
            assert not predicate(part) and not predicate(f"model.layers.3.{part}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_biases_that_choose_experts_stay_fp32_in_16_bits(family: str, dtype: mx.Dtype) -> None:
    model = tiny_mixture(family)
    biases = {n: v for n, v in tree_flatten(model.parameters()) if n.endswith(BIAS)}
    apply_precision(model, Precision("cpu", dense=False, dtype=dtype))
    after = dict(tree_flatten(model.parameters()))
    assert biases and all(mx.array_equal(after[n], v).item() for n, v in biases.items())
    found = dtypes(model)
    assert {found[n] for n in biases} == {mx.float32}
    assert {d for n, d in found.items() if n not in biases and "lm_head" not in n} == {dtype}


def test_a_block_alone_keeps_what_its_model_would(family: str = "deepseek_v3") -> None:
    model = tiny_mixture(family)
    apply_precision(model.layers[1], Precision("cpu", False, mx.bfloat16), may_cast(model))
    assert dtypes(model.layers[1])[BIAS] == mx.float32
    assert dtypes(model.layers[1])["mlp.gate.weight"] == mx.bfloat16


def test_the_text_part_of_a_multimodal_model_has_its_say() -> None:
    wrapper = nn.Module()
    wrapper.language_model = tiny_mixture("deepseek_v3")
    assert not may_cast(wrapper)(f"language_model.model.layers.1.{BIAS}")
    assert may_cast(wrapper)("language_model.lm_head.weight")


def test_where_all_is_fp32_such_a_value_is_too() -> None:
    model = tiny_mixture("deepseek_v3")
    gate = model.layers[1].mlp.gate
    gate.e_score_correction_bias = gate.e_score_correction_bias.astype(mx.bfloat16)
    apply_precision(model, Precision("cpu", dense=True, dtype=mx.float32))
    assert set(dtypes(model).values()) == {mx.float32}


@pytest.mark.parametrize("bits", (4, 16))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_chooses_the_experts_that_its_source_does(
    family: str, bits: int, tmp_path: Path
) -> None:
    skip_without_kernel(family, packed=bits == 4)
    config = mixture_config(family, max_position_embeddings=4096)
    source = write_model_of(tmp_path / "source", config)
    convert_sft(locate(str(source)), tmp_path / "out", Quantization(bits, 32), None)
    before, after = (load_lazily(p)[0] for p in (source, tmp_path / "out"))
    bias = f"model.layers.1.{BIAS}"
    found = dict(tree_flatten(after.parameters()))[bias]
    assert found.dtype == mx.float32
    assert mx.array_equal(found, dict(tree_flatten(before.parameters()))[bias]).item()
    assert not mx.array_equal(found, found.astype(mx.bfloat16)).item()  # it had something to lose


def test_rounding_such_a_bias_would_choose_other_experts() -> None:
    model = tiny_mixture("deepseek_v3")
    gate = model.layers[1].mlp.gate
    step = 2.0**-10  # between two values of bf16 near 1
    gate.e_score_correction_bias = 1 + step * mx.arange(4).astype(mx.float32)
    gate.weight = mx.zeros(gate.weight.shape)
    states = mx.random.normal((1, 3, gate.weight.shape[1]), key=key(1))
    chosen = mx.sort(gate(states)[0], axis=-1).tolist()
    apply_precision(model, Precision("cpu", dense=False, dtype=mx.bfloat16))
    assert mx.sort(gate(states.astype(mx.bfloat16))[0], axis=-1).tolist() == chosen
    assert chosen[0][0] == [2, 3]
