"""Staged backward: the gradient of a loss with respect to an adapter, one block in memory at a
time.

1. Forward, block by block; the input of each block is kept, evaluated after each.
2. The caller turns the last hidden states into their gradient (a head over chunks, or a scalar
   head).
3. Backward, `mx.vjp` of one block alone, from the last to the first that can learn, evaluated after
   each.

The prompt runs once, [1, S], beside its K completions, [K, T]; the gradient that reaches its keys
and values through the completions flows back with it. Equal to `mx.value_and_grad` over K whole
sequences (a test compares them on eight families).
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.core.types import Parameters
from mlx_grpo.models.decoder import Decoder, Embedded
from mlx_grpo.models.mlp_chunks import MLP, vjp_in_chunks


@dataclass
class Trace:
    """What a forward leaves for its backward."""

    embedded: Embedded
    inputs: list[tuple[mx.array, mx.array]]
    h_prompt: mx.array
    h_rows: mx.array


def forward(decoder: Decoder, prompt_1S: mx.array, rows_KT: mx.array) -> Trace:
    """Run a prompt, int [1, S], and its completions, int [K, T] padded on the right; keep the input
    of each block."""
    embedded = decoder.embed(prompt_1S, rows_KT)
    h_prompt, h_rows = embedded.h_prompt, embedded.h_rows
    inputs = []
    for i in range(len(decoder.blocks)):
        inputs.append((h_prompt, h_rows))
        h_prompt, h_rows = decoder.run_block(embedded, i, h_prompt, h_rows)
        mx.eval(h_prompt, h_rows)
    return Trace(embedded, inputs, h_prompt, h_rows)


def unshift(grad_KTD: mx.array, prompt_length: int) -> tuple[mx.array, mx.array]:
    """Transpose of `decoder.shift_right`: gradient of predicting states -> gradients of prompt and
    rows."""
    first_11D = grad_KTD[:, :1].sum(axis=0, keepdims=True)
    g_prompt = mx.pad(first_11D, [(0, 0), (prompt_length - 1, 0), (0, 0)])
    g_rows = mx.pad(grad_KTD[:, 1:], [(0, 0), (0, 1), (0, 0)])
    return g_prompt, g_rows


def backward(
    decoder: Decoder,
    trace: Trace,
    g_prompt: mx.array,
    g_rows: mx.array,
    total: Parameters | None = None,
) -> Parameters:
    """Gradients of the trainable parameters of the blocks by full name; empties `trace.inputs` on
    the way.

    Args:
        total: gradients to which these are added, block by block, so that one set is alive.
    """
    total = {} if total is None else total
    trainable = [bool(tree_flatten(block.trainable_parameters())) for block in decoder.blocks]
    first = trainable.index(True)
    for i in reversed(range(first, len(decoder.blocks))):
        g_prompt, g_rows, found = _block_vjp(decoder, trace, i, g_prompt, g_rows)
        prefix = decoder.block_names[i]
        for name in [n for n in found if f"{prefix}.{n}" in total]:
            found[name] = total.pop(f"{prefix}.{name}") + found[name]
        mx.eval(found)
        total |= {f"{prefix}.{n}": g for n, g in found.items()}
    trace.inputs.clear()
    return total


def _block_vjp(
    decoder: Decoder, trace: Trace, i: int, g_prompt: mx.array, g_rows: mx.array
) -> tuple[mx.array, mx.array, Parameters]:
    """Gradients of the block's inputs and of its trainable parameters by name within the block."""
    block, inputs = decoder.blocks[i], trace.inputs.pop()
    tokens = decoder.sizes.mlp_tokens
    if MLP in block and 0 < tokens < sum(h.shape[0] * h.shape[1] for h in inputs):

        def call(h_prompt: mx.array, h_rows: mx.array) -> tuple[mx.array, mx.array]:
            return decoder.call_block(trace.embedded, i, h_prompt, h_rows)

        g_inputs, found = vjp_in_chunks(block, call, inputs, (g_prompt, g_rows), tokens)
        return *g_inputs, found
    current = dict(tree_flatten(block.trainable_parameters()))
    names = list(current)

    def run(h_prompt: mx.array, h_rows: mx.array, *values: mx.array) -> list[mx.array]:
        block.update(tree_unflatten(list(zip(names, values, strict=True))))
        return list(decoder.call_block(trace.embedded, i, h_prompt, h_rows))

    try:
        values = [*inputs, *current.values()]
        _, (g_prompt, g_rows, *gradients) = mx.vjp(run, values, [g_prompt, g_rows])
    finally:
        block.update(tree_unflatten(list(current.items())))  # out with the tracers
    mx.eval(g_prompt, g_rows, gradients)
    return g_prompt, g_rows, dict(zip(names, gradients, strict=True))
