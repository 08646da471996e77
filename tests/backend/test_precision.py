"""The faster functions of the CPU backend: the numbers of those they stand in for."""

import sys

import mlx.core as mx
import pytest
from mlx_lm.models import activations

from mlx_grpo.backend.kernels import exp_rows, swiglu
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.rng import key
from tests.helpers.tiny import tiny_model


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
