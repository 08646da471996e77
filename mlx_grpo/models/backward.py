"""Gradients of an adapter, with as much of the forward pass kept in memory as there is room for.

1. Forward, block by block, each evaluated before the next. Of the lower blocks only the inputs are
   kept. The last `sizes.kept_blocks` blocks belong to one graph with its gradient: evaluating it
   piece by piece keeps their arrays, so none of them has to run again.
2. The caller turns the last hidden states into their gradient (a head over chunks, or a scalar
   head).
3. Backward from the last block to the first that can learn, each evaluated before the next. A lower
   block runs again, alone, under `mx.vjp`.

The prompt runs once, [1, S], beside its K completions, [K, T]; the gradient that reaches its keys
and values through the completions flows back with it. Equal to `mx.value_and_grad` over K whole
sequences (a test compares them, family by family).

In fp16 nothing is smaller than 6e-8, and a token's weight in the loss often is. There the gradient
travels scaled by a power of two, chosen anew before each block so that its largest entry is near
`TOP` (loss scaling; Micikevicius et al. 2018, arXiv:1710.03740, section 3.2), and what is found is
divided by it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_grpo.core.types import Parameters
from mlx_grpo.models.block_calls import Embedded, States
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import set_parameters
from mlx_grpo.models.mlp_chunks import MLP, vjp_in_chunks

Pair = tuple[mx.array, mx.array]
"""Of a prompt, [1, S, D], and of its completions, [K, T, D]."""
Cotangents = Callable[[list[Pair]], list[Pair]]
"""From the hidden states after the last block, of each pass, to the gradients of a loss there."""


TOP = 16.0
"""Largest entry of a scaled gradient: 4,096 times below what fp16 holds."""


@dataclass(frozen=True)
class Pass:
    """A prompt, int [1, S], and completions behind it, int [K, T], padded on the right."""

    prompt_1S: mx.array
    rows_KT: mx.array


@dataclass
class _Trace:
    """What the lower blocks leave for their backward."""

    embedded: Embedded
    inputs: list[States]
    states: States
    """Entering the first block that is kept."""


def gradients(
    decoder: Decoder,
    passes: Sequence[Pass],
    cotangents: Cotangents,
    total: Parameters | None = None,
) -> Parameters:
    """Gradients of a loss with respect to the trainable parameters of the blocks, by full name.

    Args:
        cotangents: called once, when all passes have run.
        total: gradients to which these are added, block by block, so that one set is alive.
    """
    total = {} if total is None else total
    first = next(i for i, block in enumerate(decoder.blocks) if _trainable(block))
    cut = max(first, len(decoder.blocks) - decoder.sizes.kept_blocks)
    traces = [_forward(decoder, p, first, cut) for p in passes]
    scaled = _LossScale(traces[0].embedded.h_rows.dtype)
    if cut == len(decoder.blocks):
        wanted = cotangents([trace.states for trace in traces])
    else:
        wanted = _through_kept_blocks(decoder, traces, cut, cotangents, total, scaled)
    for i in reversed(range(first, cut)):
        wanted = scaled(wanted)
        for j, trace in enumerate(traces):
            wanted[j], found = _block_vjp(decoder, trace, i, wanted[j])
            _add(total, decoder.block_names[i], found, scaled.factor)
    return total


class _LossScale:
    """Scales gradients that fp16 is to carry; in other dtypes the factor stays 1."""

    def __init__(self, dtype: mx.Dtype):
        self.factor = 1.0
        self._active = dtype == mx.float16

    def __call__(self, wanted: list[States]) -> list[States]:
        """The gradients, scaled so that the largest entry is near `TOP`; the factor follows."""
        if not self._active:
            return wanted
        most = mx.stack([mx.abs(g).max().astype(mx.float32) for gs in wanted for g in gs]).max()
        if not 0 < most.item() < math.inf:  # nothing to scale, or for the guard of the step to find
            return wanted
        step = 2.0 ** math.floor(math.log2(TOP / most.item()))
        self.factor *= step
        return [tuple(g * step for g in gs) for gs in wanted]


def _forward(decoder: Decoder, p: Pass, first: int, cut: int) -> _Trace:
    """Run the blocks below `cut`; keep the inputs of those from `first` on."""
    embedded = decoder.embed(p.prompt_1S, p.rows_KT)
    states: States = (embedded.h_prompt, embedded.h_rows)
    inputs = []
    for i in range(cut):
        if i >= first:
            inputs.append(states)
        states = decoder.run_block(embedded, i, *states)
        mx.eval(states)
    return _Trace(embedded, inputs, states)


def _through_kept_blocks(
    decoder: Decoder,
    traces: Sequence[_Trace],
    cut: int,
    cotangents: Cotangents,
    total: Parameters,
    scaled: _LossScale,
) -> list[States]:
    """Forward and backward of the blocks from `cut` on; the gradients of the states that enter it.

    The graph of the gradient is built before the cotangents are known. They are read from buffers
    that are filled once the forward has been evaluated, and nothing reads them earlier.
    """
    blocks, entering = decoder.blocks[cut:], [trace.states for trace in traces]
    buffers = [
        tuple(
            mx.zeros((h.shape[-3], length, h.shape[-1]))
            for h, length in zip(trace.states, trace.embedded.lengths, strict=False)
        )
        for trace in traces
    ]
    mx.eval(buffers)

    def surrogate(
        states: list[States], values: list[Parameters]
    ) -> tuple[mx.array, list[list[States]]]:
        """The scalar whose gradient is wanted, and the states after each block of each pass."""
        for block, own in zip(blocks, values, strict=True):
            set_parameters(block, own)
        after: list[list[States]] = [[] for _ in blocks]
        scalar = mx.array(0.0)
        for trace, h, buffer in zip(traces, states, buffers, strict=True):
            for i in range(len(blocks)):
                h = decoder.call_block(trace.embedded, cut + i, *h)
                after[i].append(h)
            for value, wanted in zip(h, buffer, strict=True):
                scalar = scalar + (wanted * value).sum()
        return scalar, after

    with _put_back(blocks):
        (_, after), (g_states, g_values) = mx.value_and_grad(surrogate, argnums=(0, 1))(
            entering, [_trainable(block) for block in blocks]
        )
    for states in after:
        mx.eval(states)
    last = after[-1]
    del after, states
    for buffer, wanted in zip(buffers, scaled(cotangents(last)), strict=True):
        for place, value in zip(buffer, wanted, strict=True):
            np.asarray(place)[...] = np.asarray(value)
    del last
    for i in reversed(range(len(blocks))):
        _add(total, decoder.block_names[cut + i], g_values.pop(), scaled.factor)
    mx.eval(g_states)
    return list(g_states)


def _block_vjp(
    decoder: Decoder, trace: _Trace, i: int, cotangents: States
) -> tuple[States, Parameters]:
    """Gradients of a block's inputs and of its trainable parameters by name within the block."""
    block, inputs = decoder.blocks[i], trace.inputs.pop()
    tokens = decoder.sizes.mlp_tokens
    one_stream = inputs[0].ndim == 3
    if (
        MLP in block
        and one_stream
        and 0 < tokens < sum(h.shape[0] * h.shape[1] for h in inputs[:2])
    ):

        def call(*states: mx.array) -> States:
            return decoder.call_block(trace.embedded, i, *states)

        return vjp_in_chunks(block, call, inputs, cotangents, tokens)
    current = _trainable(block)

    def run(*values: mx.array) -> list[mx.array]:
        states, own = values[: len(inputs)], values[len(inputs) :]
        set_parameters(block, dict(zip(current, own, strict=True)))
        return list(decoder.call_block(trace.embedded, i, *states))

    with _put_back([block]):
        _, found = mx.vjp(run, [*inputs, *current.values()], list(cotangents))
    mx.eval(found)
    g_states, g_values = found[: len(inputs)], found[len(inputs) :]
    return tuple(g_states), dict(zip(current, g_values, strict=True))


def _add(total: Parameters, prefix: str, found: Parameters, factor: float) -> None:
    """Add the gradients of one block, divided by a factor, and evaluate them."""
    if factor != 1:
        found = {name: g / factor for name, g in found.items()}
    for name in [n for n in found if f"{prefix}.{n}" in total]:
        found[name] = total.pop(f"{prefix}.{name}") + found[name]
    mx.eval(found)
    total |= {f"{prefix}.{n}": g for n, g in found.items()}


def _trainable(block: nn.Module) -> Parameters:
    return dict(tree_flatten(block.trainable_parameters()))


@contextmanager
def _put_back(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever a differentiated function put into the blocks, they have their own arrays after."""
    current = [_trainable(block) for block in blocks]
    try:
        yield
    finally:
        for block, own in zip(blocks, current, strict=True):
            set_parameters(block, own)
