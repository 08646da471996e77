"""What MLX's kernels are good at: replacements for two elementwise functions that are slow on a CPU
(the MLP's activation, the exponential of a softmax over the vocabulary), and how many rows a GPU's
products take at a time."""

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_grpo.backend.device import device_name

LOG2_E = 1.4426950408889634
TILE = 32
"""Rows that a quantized product on a GPU computes together: 10 to 32 cost the same, 33 cost twice
as much (ml-explore/mlx, issue 3863)."""
FEW_ROWS = 8
"""Up to which a GPU has a kernel whose time grows with the rows."""


def worth_dropping(rows: int, left: int) -> bool:
    """Whether finished rows should leave a batch: dropping them copies its caches. On a CPU once
    they are an eighth; on a GPU once a tile falls away."""
    if device_name() == "cpu" or left <= FEW_ROWS:
        return left <= 0.875 * rows
    return -(-left // TILE) < -(-rows // TILE)


def whole_tiles(rows: int) -> int:
    """So many rows, cut to whole tiles where there is one."""
    return rows // TILE * TILE or rows


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + mx.power(2.0, gate * -LOG2_E))


@_swiglu.vjp
def _swiglu_vjp(
    inputs: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = inputs
    sigmoid = 1 / (1 + mx.power(2.0, gate * -LOG2_E))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, the same to fp32 rounding, in a third of the time on a CPU.

    MLX's exp and sigmoid take 12 to 16 ns per element there, its power takes 4, and an MLP spent as
    long in its activation as in one of its matrices. Anything but fp32 on a CPU is left to mlx-lm.
    """
    if gate.dtype == mx.float32 and device_name() == "cpu":
        return _swiglu(gate, up)
    from mlx_lm.models import activations  # mlx-lm takes two seconds to import: not for --help

    return activations.swiglu(gate, up)


def use_fast_swiglu(model: nn.Module) -> None:
    """Let the blocks of this model's family call `swiglu` above instead of mlx-lm's.

    Blocks look the function up in the module that defines them, so it is replaced there, for this
    process.
    """
    from mlx_lm.models import activations

    family = sys.modules[type(model).__module__]
    if getattr(family, "swiglu", None) is activations.swiglu:
        family.swiglu = swiglu  # type: ignore[attr-defined]


def exp_rows(z_NV: mx.array) -> tuple[mx.array, mx.array]:
    """(exp(z - max) [N, V], max [N, 1]) of fp32 logits, which the caller must not use afterwards.

    On a CPU numpy's vectorised exp takes 0.8 ns per element where MLX's takes 28, and a softmax
    over a vocabulary would cost more than the matmul that made it; so there it overwrites the
    evaluated buffer in place.
    """
    if device_name() != "cpu":
        top_N1 = z_NV.max(axis=-1, keepdims=True)
        return mx.exp(z_NV - top_N1), top_N1
    mx.eval(z_NV)
    values = np.asarray(z_NV)
    top = values.max(axis=-1, keepdims=True)
    np.subtract(values, top, out=values)
    np.exp(values, out=values)
    return z_NV, mx.array(top)


def aligned_rank(factor: mx.array, axis: int) -> mx.array:
    """A factor of experts' LoRA, its rank filled up with zeros where `mx.gather_mm` needs it: MLX
    0.32's kernels on CUDA read 16 bytes at a time and fault where a row is no multiple of that."""
    missing = -factor.shape[axis] % 8
    if device_name() != "cuda" or not missing:
        return factor
    return mx.pad(factor, [(0, missing if i == axis else 0) for i in range(factor.ndim)])


def gathered_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """What `mx.gather_mm` is to compute in: MLX's CPU backend has it for fp32 alone."""
    return mx.float32 if device_name() == "cpu" else dtype
