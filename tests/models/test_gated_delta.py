"""The gated delta rule in pieces of time, against mlx-lm's own over all of it."""

import gc

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta as of_mlx_lm

from mlx_grpo.models.families import gated_delta
from tests.helpers.decoders import small_decoder

ROWS, HEADS, WIDTH = 2, 4, 16


def _inputs(tokens: int, width: int = WIDTH, *, vector: bool = False) -> list[mx.array]:
    """q, k, v, g, beta and the state, as mlx-lm names them; two heads of v share one of q."""
    mx.random.seed(3)
    q, k = (0.3 * mx.random.normal((ROWS, tokens, HEADS // 2, width)) for _ in range(2))
    v = mx.random.normal((ROWS, tokens, HEADS, width))
    gates = (ROWS, tokens, HEADS, width) if vector else (ROWS, tokens, HEADS)
    g, beta = mx.random.uniform(shape=gates), mx.random.uniform(shape=(ROWS, tokens, HEADS))
    return [q, k, v, g, beta, mx.random.normal((ROWS, HEADS, width, width))]


def _vjp(inputs: list[mx.array], mask: mx.array | None = None) -> list[mx.array]:
    """Outputs and gradients of them all."""

    def rule(*values: mx.array) -> list[mx.array]:
        return list(of_mlx_lm.gated_delta_ops(*values, mask))

    mx.random.seed(4)
    wanted = [mx.random.normal(inputs[2].shape), mx.random.normal(inputs[5].shape)]
    outputs, found = mx.vjp(rule, inputs, wanted)
    mx.eval(outputs, found)
    return [*outputs, *found]


@pytest.mark.parametrize("tokens", [1, gated_delta.PIECE_TOKENS, 2 * gated_delta.PIECE_TOKENS + 5])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_equal_those_over_all_tokens(
    tokens: int, vector: bool, masked: bool
) -> None:
    inputs = _inputs(tokens, vector=vector)
    mask = mx.arange(tokens)[None] < mx.array([[tokens], [tokens // 2]]) if masked else None
    expected = _vjp(inputs, mask)
    with gated_delta.in_pieces():
        assert of_mlx_lm.gated_delta_ops is gated_delta._in_pieces
        found = _vjp(inputs, mask)
    assert of_mlx_lm.gated_delta_ops is gated_delta._of_all_tokens
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and mx.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_more_tokens_cost_few_states() -> None:
    def peak(tokens: int) -> int:
        inputs = _inputs(tokens, 96)
        mx.eval(inputs)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with gated_delta.in_pieces():
            _vjp(inputs)
        return mx.get_peak_memory() - before

    state = 4 * ROWS * HEADS * 96 * 96
    added = (peak(256) - peak(128)) / state
    print(f"128 tokens more take {added:.1f} states")
    assert added < 128 / 4


def test_models_with_the_rule_are_known() -> None:
    names = ("qwen3_5", "qwen3_next", "kimi_linear", "olmo_hybrid", "mamba2", "llama")
    found = [gated_delta.has_gated_delta(small_decoder(name)) for name in names]
    assert found == [True, True, True, True, False, False]
