"""The MLP of a block over some tokens at a time, forward and backward, without code per family.

An MLP works on each token alone, and in a wide block (Gemma-2B: 2,048 in, 16,384 between) its
arrays are nearly all of the memory. Whatever a block does around its MLP, it is a function

    out = rest(h, mlp(u)),  u = what it gives its MLP to read,

so with the MLP replaced by a stand-in that notes u and returns a given array, the gradient goes
backwards in three steps: through `rest` to the MLP's output, through the MLP chunk by chunk, each
evaluated before the next is built, and through the remaining block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

MLP = "mlp"
"""The attribute that holds a block's MLP in mlx-lm; a block without it is never cut."""

States = tuple[mx.array, ...]
"""Of the prompt, [1, S, D], and of its completions, [K, T, D], then what else travels between
blocks."""


@contextmanager
def _mlp_replaced(block: nn.Module, stand_in: Callable[[mx.array], mx.array]) -> Iterator[None]:
    original = block[MLP]
    block[MLP] = stand_in  # as an item: the order of the block's parameters stays
    try:
        yield
    finally:
        block[MLP] = original


@contextmanager
def mlp_in_chunks(block: nn.Module, tokens: int) -> Iterator[None]:
    """Within it the block's MLP runs over `tokens` tokens at a time (0: all), each chunk evaluated;
    not for functions that are differentiated."""
    if not tokens or MLP not in block:
        yield
        return
    mlp = block[MLP]

    def run(x_BTD: mx.array) -> mx.array:
        if x_BTD.shape[0] * x_BTD.shape[1] <= tokens:
            return mlp(x_BTD)
        parts = []
        for x in _chunks(x_BTD, tokens):
            parts.append(mlp(x))
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=1).reshape(*x_BTD.shape[:2], -1)

    with _mlp_replaced(block, run):
        yield


def _chunks(x_BTD: mx.array, tokens: int) -> list[mx.array]:
    flat_1ND = x_BTD.reshape(1, -1, x_BTD.shape[-1])
    return [flat_1ND[:, i : i + tokens] for i in range(0, flat_1ND.shape[1], tokens)]


class _Given:
    """Stands in for an MLP: notes what it reads and returns the given arrays in their order."""

    def __init__(self, outputs: Sequence[mx.array]):
        self.outputs = list(outputs)
        self.inputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs.append(x)
        return self.outputs[len(self.inputs) - 1]


def vjp_in_chunks(
    block: nn.Module,
    run: Callable[..., States],
    inputs: States,
    cotangents: States,
    tokens: int,
) -> tuple[States, dict[str, mx.array]]:
    """As `mx.vjp` of `run`, a call of the block on prompt and completions, its MLP over `tokens`
    tokens at a time.

    Returns:
        (gradients of the inputs, of the trainable parameters by name within the block).
    """
    mlp = block[MLP]
    current = dict(tree_flatten(block.trainable_parameters()))
    outside = {n: v for n, v in current.items() if not n.startswith(f"{MLP}.")}

    def rest(outputs: Sequence[mx.array], *hs: mx.array) -> tuple[list[mx.array], States]:
        given = _Given(outputs)
        with _mlp_replaced(block, given):
            out = run(*hs)
        return given.inputs, out

    read, _ = rest(inputs[:2], *inputs)
    mx.eval(read)
    written = [mx.full(x.shape, mx.nan, dtype=x.dtype) for x in inputs[:2]]
    wanted = _output_gradient(rest, inputs, written, cotangents)
    if any(mx.isnan(g).any().item() for g in wanted):  # a norm follows: the output itself matters
        with mlp_in_chunks(block, tokens):
            written = [block[MLP](x) for x in read]
            mx.eval(written)
        wanted = _output_gradient(rest, inputs, written, cotangents)
    through, gradients = _mlp_vjp(mlp, read, wanted, tokens)

    def around(*values: Any) -> list[mx.array]:
        block.update(tree_unflatten(list(zip(outside, values[len(inputs) :], strict=True))))
        seen, out = rest(written, *values[: len(inputs)])
        return [*seen, *out]

    try:
        _, found = mx.vjp(around, [*inputs, *outside.values()], [*through, *cotangents])
    finally:
        block.update(tree_unflatten(list(outside.items())))  # out with the tracers
    gradients |= dict(zip(outside, found[len(inputs) :], strict=True))
    g_states = tuple(found[: len(inputs)])
    mx.eval(g_states, gradients)
    return g_states, {n: gradients[n] for n in current}


def _output_gradient(
    rest: Callable[..., tuple[list[mx.array], States]],
    inputs: States,
    written: list[mx.array],
    cotangents: States,
) -> list[mx.array]:
    """Gradient with respect to what the MLP returns, for prompt and completions."""
    _, wanted = mx.vjp(lambda *m: list(rest(m, *inputs)[1]), written, list(cotangents))
    mx.eval(wanted)
    return wanted


def _mlp_vjp(
    mlp: nn.Module, read: list[mx.array], wanted: list[mx.array], tokens: int
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """(gradients of what the MLP reads, of its trainable parameters by name within the block)."""
    current = dict(tree_flatten(mlp.trainable_parameters()))
    total: dict[str, mx.array] = {}

    def run(x: mx.array, *values: mx.array) -> list[mx.array]:
        mlp.update(tree_unflatten(list(zip(current, values, strict=True))))
        return [mlp(x)]

    def one(x: mx.array, g: mx.array) -> mx.array:
        nonlocal total
        _, (g_x, *found) = mx.vjp(run, [x, *current.values()], [g])
        named = dict(zip(current, found, strict=True))
        total = {n: total[n] + v if total else v for n, v in named.items()}
        mx.eval(g_x, total)
        return g_x

    through = []
    try:
        for x_BTD, g_BTD in zip(read, wanted, strict=True):
            pairs = zip(_chunks(x_BTD, tokens), _chunks(g_BTD, tokens), strict=True)
            parts = [one(x, g) for x, g in pairs]
            through.append(mx.concatenate(parts, axis=1).reshape(x_BTD.shape))
    finally:
        mlp.update(tree_unflatten(list(current.items())))
    return through, {f"{MLP}.{n}": g for n, g in total.items()}
