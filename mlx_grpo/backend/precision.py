"""How frozen weights are held and in which dtype a decoder's blocks compute.

- Metal and CUDA: weights stay packed, MLX's quantized kernels do the work, activations have 16
  bits: fp16 on M1 and M2, which have no bf16 in hardware, and bf16 elsewhere.
- Linux CPU: MLX's 4-bit and 16-bit kernels are 10 to 100 times slower than an fp32 BLAS, so the
  frozen weights are expanded once to fp32 (the same values). During a rollout they hold the LoRA
  too (`models/merging.py`).

A user can ask for any other combination, on any device. Behind the last block everything is fp32,
whatever the blocks compute in (`models/decoder.py`): what is sampled is what is scored.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_grpo.backend.device import device_name, has_bf16, physical_memory
from mlx_grpo.backend.fp32_head import hold_head_in_fp32
from mlx_grpo.backend.kernels import use_fast_swiglu
from mlx_grpo.backend.own_dtypes import may_cast
from mlx_grpo.core.errors import InputError

EXPANDED_BYTES = 32 << 20
"""Of fp32 values that are unpacked at a time."""
QUANTIZED = (
    nn.QuantizedLinear,
    nn.QuantizedEmbedding,
    QuantizedSwitchLinear,
    QuantizedMultiLinear,
)
DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
ALLOWED = {
    "MLX_GRPO_PRECISION": ("auto", *DTYPES),
    "MLX_GRPO_WEIGHTS": ("auto", "packed", "dense"),
}
"""Variables that say what `auto` means, instead of what this machine does best."""


@dataclass(frozen=True)
class Asked:
    """A precision that was asked for; `auto` leaves it to this machine."""

    dtype: str = "auto"
    weights: str = "auto"


def asked(dtype: str = "auto", weights: str = "auto") -> Asked:
    """What settings ask for, and the environment where they say `auto`.

    Raises:
        InputError: a variable has no such value.
    """
    found = []
    for value, (variable, allowed) in zip((dtype, weights), ALLOWED.items(), strict=True):
        if value == "auto":
            value = os.environ.get(variable) or value
        if value not in allowed:
            raise InputError(f"{variable}: must be one of {', '.join(allowed)}, not '{value}'")
        found.append(value)
    return Asked(*found)


@dataclass(frozen=True)
class Precision:
    """How frozen weights are held and what activations are."""

    device: str
    """`cpu`, `metal` or `cuda`."""
    dense: bool
    """Expand quantized weights once to `dtype` instead of using the quantized kernels."""
    dtype: mx.Dtype
    """Dtype of the blocks' activations, of scales and of weights that are not packed."""

    @property
    def merge_lora(self) -> bool:
        """Whether to sample from W + scale * (A B)^T: one product instead of three. In 16 bits the
        sum would be rounded, and another policy sampled than is scored."""
        return self.dense and self.dtype == mx.float32

    @property
    def slow(self) -> bool:
        """Whether MLX's kernels for it are 10 to 100 times slower than an fp32 BLAS."""
        return self.device == "cpu" and not (self.dense and self.dtype == mx.float32)

    def __str__(self) -> str:
        name = next(n for n, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{'dense' if self.dense else 'packed'} {name}"


def precisions(parameters: int, wanted: Asked | None = None) -> list[Precision]:
    """What a model of so many parameters may be held in, the fastest first: packed weights on a
    GPU; on a CPU dense fp32 while it fits in half the RAM, and packed weights after it."""
    wanted = wanted or asked()
    if wanted.weights != "auto":
        return [precision_for(wanted.weights == "dense", wanted)]
    size = 4 if wanted.dtype in ("auto", "fp32") else 2
    fits = device_name() == "cpu" and parameters * size < physical_memory() / 2
    return [precision_for(dense, wanted) for dense in ((True, False) if fits else (False,))]


def choose_precision(parameters: int, wanted: Asked | None = None) -> Precision:
    """The fastest of `precisions`."""
    return precisions(parameters, wanted)[0]


def precision_for(dense: bool, wanted: Asked | None = None) -> Precision:
    """The precision of this machine with weights expanded or packed."""
    wanted, device = wanted or asked(), device_name()
    if wanted.dtype != "auto":
        return Precision(device, dense, DTYPES[wanted.dtype])
    if device == "cpu" and dense:
        return Precision(device, dense, mx.float32)
    return Precision(device, dense, mx.bfloat16 if has_bf16() else mx.float16)


def dense_weight(module: nn.Module, rows: slice = slice(None)) -> mx.array:
    """Rows of the weight of a Linear or Embedding, quantized or not, in fp32."""
    if "scales" not in module:
        return module.weight[rows].astype(mx.float32)
    affine = module.mode == "affine"  # other modes have scales of 8 bits, no floats
    scales = module.scales[rows].astype(mx.float32) if affine else module.scales[rows]
    biases = module.get("biases")
    return mx.dequantize(
        module.weight[rows],
        scales,
        None if biases is None else biases[rows].astype(mx.float32),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    ).astype(mx.float32)


def float_dtype(module: nn.Module) -> mx.Dtype:
    """The 16-bit dtype of a quantized module; mxfp4, mxfp8 and nvfp4 have scales that are no
    floats, and stand for values that bf16 holds."""
    dtype = module.scales.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


def expand_into(weight: mx.array, module: nn.Module) -> None:
    """Overwrite `weight` with the values of a quantized Linear or Embedding, computed in fp32.

    Some rows at a time, since dequantizing takes several times the memory of its result. Whoever
    holds the same array object sees the new values.
    """
    for rows in in_parts(weight):
        weight[rows] = dense_weight(module, rows).astype(weight.dtype)
        mx.eval(weight)


def in_parts(weight: mx.array) -> Iterator[slice]:
    """Rows of a weight, or experts, of which so many are worked on at a time."""
    step = max(1, EXPANDED_BYTES // (4 * math.prod(weight.shape[1:])))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _expanded(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The dense twin of a quantized layer."""
    *count, packed = module.weight.shape
    dense = dense_twin(module)
    dense.weight = mx.zeros((*count, packed * 32 // module.bits), dtype)
    expand_into(dense.weight, module)
    if "bias" in module:
        dense.bias = module.bias.astype(dtype)
    return dense


def dense_twin(module: nn.Module) -> nn.Module:
    """A layer of the kind of another, not quantized, for each that `can_expand`; its arrays are
    still to be set."""
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return nn.Embedding(1, 1)
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        return SwitchLinear(1, 1, 1, bias=False)
    if isinstance(module, MultiLinear | QuantizedMultiLinear):
        return MultiLinear(1, 1, 1)
    return nn.Linear(1, 1, bias=False)


def can_expand(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of a known kind; a family may have its own, and experts
    of nvfp4 a scale each, and those stay packed."""
    return type(module) in QUANTIZED and module.get("global_scale") is None


def apply_precision(
    model: nn.Module, precision: Precision, castable: Callable[[str], bool] | None = None
) -> None:
    """Bring a freshly loaded model, or one of its blocks, into the form of `precision`, in place,
    module by module. What its family keeps in its own dtype stays in it, and is fp32 where all is.

    Args:
        castable: which parameters a block's model casts (`may_cast`); None asks `model` itself.

    Raises:
        InputError: a weight or scale leaves the range of fp16.
    """
    if precision.dense:
        use_fast_swiglu(model)
        _expand(model, precision.dtype)
    held = hold_head_in_fp32(model, precision.dtype)
    if precision.dtype != mx.float32:
        castable = castable or may_cast(model)
        held |= {n for n, _ in tree_flatten(model.parameters()) if not castable(n)}
    parameters = dict(tree_flatten(model.parameters()))
    while parameters:  # one by one: no two copies of more than one array
        name, value = parameters.popitem()
        if name not in held and mx.issubdtype(value.dtype, mx.floating):
            value = _in_range(name, value, precision.dtype)
            model.update(tree_unflatten([(name, value)]))
        mx.eval(value)


def _expand(model: nn.Module, dtype: mx.Dtype) -> None:
    quantized = [(name, module) for name, module in model.named_modules() if can_expand(module)]
    while quantized:
        name, module = quantized.pop()
        dense = _expanded(module, dtype)
        mx.eval(dense.parameters())
        model.update_modules(tree_unflatten([(name, dense)]))
        del module


def _in_range(name: str, value: mx.array, dtype: mx.Dtype) -> mx.array:
    cast = value.astype(dtype)
    if dtype == mx.float16 and not mx.isfinite(cast).all().item():
        raise InputError(f"'{name}' leaves the range of fp16; type --precision bf16")
    return cast
