"""The gated delta rule of Qwen3-Next, Qwen3.5, Kimi Linear and others, in pieces of time.

mlx-lm differentiates it token by token, and the gradient of each step reads several copies of a
state [rows, heads, values, keys]: 2 MB a row and token with 32 heads of 128 x 128. Here the
gradient keeps one state for every `PIECE_TOKENS` tokens and runs each piece again when it is its
turn (Chen et al. 2016, arXiv:1604.06174, section 4, over time in place of layers).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

PIECE_TOKENS = 16
"""Of a piece: about the square root of a completion's, which makes what is kept between the pieces
as large as what one of them needs."""

_of_all_tokens = gated_delta.gated_delta_ops


@mx.custom_function
def _piece(*inputs: mx.array) -> tuple[mx.array, mx.array]:
    return _of_all_tokens(*inputs)


@_piece.vjp
def _piece_again(
    inputs: tuple[mx.array, ...], wanted: tuple[mx.array, ...], _: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Nothing of a piece runs again before its cotangents are there, and no gradient of it waits
    for that of another piece: otherwise the states of all pieces would be alive together."""
    values, mask = mx.depends(list(inputs[:6]), list(wanted)), inputs[6:]
    _, found = mx.vjp(lambda *v: list(_of_all_tokens(*v, *mask)), values, list(wanted))
    return (*mx.depends(found, found), *map(mx.zeros_like, mask))


def _in_pieces(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As mlx-lm's `gated_delta_ops`, whose arguments these are."""
    if state is None:
        state = mx.zeros((q.shape[0], *v.shape[2:], q.shape[3]), mx.float32)
    of_time = [a for a in (q, k, v, g, beta, mask) if a is not None]
    outputs = []
    for start in range(0, q.shape[1], PIECE_TOKENS):
        now = [a[:, start : start + PIECE_TOKENS] for a in of_time]
        y, state = _piece(*now[:5], state, *now[5:])
        outputs.append(y)
    return mx.concatenate(outputs, axis=1), state


def has_gated_delta(model: nn.Module) -> bool:
    """Whether a block of an mlx-lm model has this rule."""
    modules = {sys.modules[type(block).__module__] for block in model.layers}
    return any(hasattr(module, gated_delta.gated_delta_update.__name__) for module in modules)


@contextmanager
def in_pieces() -> Iterator[None]:
    """Within it a gated delta rule runs in pieces, forward and backward."""
    gated_delta.gated_delta_ops = _in_pieces
    try:
        yield
    finally:
        gated_delta.gated_delta_ops = _of_all_tokens
