"""Which precision is chosen and what it does to a model; faster functions of the CPU backend."""

import os
import sys
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations

from mlx_grpo.backend import device, kernels, precision
from mlx_grpo.backend.device import share_for_mlx
from mlx_grpo.backend.kernels import exp_rows, swiglu, whole_tiles, worth_dropping
from mlx_grpo.backend.precision import (
    ALLOWED,
    Asked,
    Precision,
    apply_precision,
    asked,
    choose_precision,
    precision_for,
    precisions,
)
from mlx_grpo.config.settings import Dtype, Weights
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.models.backbone import share
from tests.helpers.tiny import tiny_model


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-gpu` asks for a precision in the environment; what is chosen without is tested."""
    for variable in ALLOWED:
        monkeypatch.delenv(variable, raising=False)


def inputs(scale: float) -> list[mx.array]:
    return [scale * mx.random.normal((5, 64), key=key(1, name)) for name in ("gate", "up", "grad")]


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_swiglu_and_its_gradient_are_those_of_mlx_lm(scale: float) -> None:
    gate, up, cotangent = inputs(scale)
    (expected,), gradients = mx.vjp(activations.swiglu, [gate, up], [cotangent])
    (found,), found_gradients = mx.vjp(swiglu, [gate, up], [cotangent])
    for a, b in zip([expected, *gradients], [found, *found_gradients], strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-6 * scale).item()


def test_swiglu_stays_finite_where_the_exponential_overflows() -> None:
    gate = mx.array([-1e4, -150.0, 0.0, 150.0, 1e4])
    (value,), (g_gate, g_up) = mx.vjp(swiglu, [gate, mx.ones(5)], [mx.ones(5)])
    assert value.tolist() == [0.0, 0.0, 0.0, 150.0, 1e4]
    assert g_gate.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert g_up.tolist() == value.tolist()


def test_swiglu_leaves_half_precision_to_mlx_lm() -> None:
    gate, up, _ = (x.astype(mx.bfloat16) for x in inputs(3.0))
    assert swiglu(gate, up).tolist() == activations.swiglu(gate, up).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "phi3"])
def test_the_blocks_of_a_dense_model_call_the_fast_swiglu(family: str) -> None:
    model, tokens = tiny_model(family), mx.arange(6)[None]
    module = sys.modules[type(model).__module__]
    before = module.swiglu
    try:
        module.swiglu = activations.swiglu
        expected = model(tokens)
        apply_precision(model, Precision("cpu", dense=True, dtype=mx.float32))
        assert module.swiglu is swiglu
        assert mx.allclose(model(tokens), expected, atol=1e-5).item()
    finally:
        module.swiglu = before


def test_exp_rows_are_those_of_a_stable_softmax() -> None:
    logits = 30 * mx.random.normal((3, 50), key=key(2))
    expected = mx.softmax(logits, axis=-1)
    values, top = exp_rows(logits + 0)
    assert mx.allclose(values / values.sum(axis=-1, keepdims=True), expected, atol=1e-6).item()
    assert top[:, 0].tolist() == logits.max(axis=-1).tolist()


def test_a_precision_can_be_asked_for_by_setting_and_by_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (device, precision):
        monkeypatch.setattr(module, "device_name", lambda: "cpu")
    assert str(precision_for(True, Asked("bf16"))) == "dense bf16"
    assert [str(p) for p in precisions(1000, Asked("fp16", "packed"))] == ["packed fp16"]
    assert [str(p) for p in precisions(1000, Asked())] == ["dense fp32", "packed bf16"]
    monkeypatch.setenv("MLX_GRPO_PRECISION", "fp16")
    monkeypatch.setenv("MLX_GRPO_WEIGHTS", "packed")
    assert str(choose_precision(1000)) == "packed fp16"
    assert asked("bf16", "dense") == Asked("bf16", "dense")  # a setting comes first
    monkeypatch.setenv("MLX_GRPO_PRECISION", "fp8")
    with pytest.raises(InputError, match="MLX_GRPO_PRECISION: must be one of auto, fp32, bf16, fp"):
        asked()


def test_settings_and_backend_know_the_same_names() -> None:
    for kind, allowed in zip((Dtype, Weights), ALLOWED.values(), strict=True):
        assert get_args(kind) == allowed


@pytest.mark.parametrize(
    "generation, dtype", [("g13s", "fp16"), ("g14d", "fp16"), ("g15p", "bf16"), ("g17s", "bf16")]
)
def test_macs_without_bf16_in_hardware_compute_in_fp16(
    generation: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (device, precision):
        monkeypatch.setattr(module, "device_name", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": f"applegpu_{generation}"})
    assert str(precision_for(dense=False)) == f"packed {dtype}"


@pytest.mark.parametrize("family", ["llama", "gemma"])  # a head of its own, and a tied one
@pytest.mark.parametrize("dense", [True, False])
def test_the_head_is_held_in_fp32_and_the_stream_in_16_bits(family: str, dense: bool) -> None:
    model = tiny_model(family)
    nn.quantize(model, group_size=32, bits=4)
    apply_precision(model, Precision("cpu", dense, mx.float16))
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    assert head["weight" if dense else "scales"].dtype == mx.float32
    assert model.model.embed_tokens(mx.array([1])).dtype == mx.float16
    block = model.layers[0].mlp.up_proj
    assert block["weight" if dense else "scales"].dtype == mx.float16
    assert share(model).model.embed_tokens(mx.array([1])).dtype == mx.float16


def test_a_scale_that_fp16_cannot_hold_is_refused() -> None:
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    model.layers[1].mlp.up_proj.weight *= 1e6
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(
        InputError, match=r"'model\.layers\.1\.mlp\.up_proj.*fp16; type --precision bf"
    ):
        apply_precision(model, Precision("cpu", dense=False, dtype=mx.float16))


def test_rows_are_dropped_where_it_saves_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "device_name", lambda: "cpu")
    assert worth_dropping(96, 84) and not worth_dropping(96, 85)
    monkeypatch.setattr(kernels, "device_name", lambda: "metal")
    assert worth_dropping(96, 64) and not worth_dropping(96, 65)
    assert not worth_dropping(30, 9) and worth_dropping(30, 8)
    assert [whole_tiles(n) for n in (1, 31, 32, 100)] == [1, 31, 32, 96]


def test_fp32_products_are_exact() -> None:
    assert os.environ["MLX_ENABLE_TF32"] == "0"


def test_what_mlx_may_plan_with_leaves_room_for_the_process() -> None:
    assert share_for_mlx(11_453_246_122) == int(0.85 * 11_453_246_122) - 600_000_000
