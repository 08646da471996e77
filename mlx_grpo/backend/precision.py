"""How frozen weights are held: packed, or expanded once to a dense dtype.

- Metal and CUDA: weights stay packed, MLX's quantized kernels do the work, activations are bf16.
- Linux CPU: MLX's 4-bit and bf16 kernels are 10 to 100 times slower than an fp32 BLAS, so the
  frozen weights are expanded once to fp32 (the same values). During a rollout they hold the LoRA
  too (`models/merging.py`).
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.backend.device import device_name, physical_memory
from mlx_grpo.backend.kernels import use_fast_swiglu

EXPANDED_BYTES = 32 << 20
"""Of fp32 values that are unpacked at a time."""


@dataclass(frozen=True)
class Precision:
    """How frozen weights are held and what activations are."""

    device: str
    """`cpu`, `metal` or `cuda`."""
    dense: bool
    """Expand quantized weights once to `dtype` instead of using the quantized kernels."""
    dtype: mx.Dtype
    """Dtype of activations and unpacked weights; packed weights bring the dtype of their scales."""

    @property
    def merge_lora(self) -> bool:
        """Whether to sample from W + scale * (A B)^T: one product instead of three."""
        return self.dense

    @property
    def slow(self) -> bool:
        """Whether MLX's kernels for it are 10 to 100 times slower than an fp32 BLAS."""
        return self.device == "cpu" and not self.dense


def choose_precision(parameters: int) -> Precision:
    """Packed weights on a GPU; on a CPU dense fp32 while it fits in half the RAM."""
    return precision_for(device_name() == "cpu" and parameters * 4 < physical_memory() / 2)


def precision_for(dense: bool) -> Precision:
    """The precision of this machine with weights expanded or packed."""
    device = device_name()
    return Precision(device, dense, mx.float32 if device == "cpu" else mx.bfloat16)


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
    step = max(1, EXPANDED_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        weight[rows] = dense_weight(module, rows).astype(weight.dtype)
        mx.eval(weight)


def _expanded(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The dense twin of a quantized Linear or Embedding."""
    count, packed = module.weight.shape
    weight = mx.zeros((count, packed * 32 // module.bits), dtype)
    expand_into(weight, module)
    if isinstance(module, nn.QuantizedEmbedding):
        dense = nn.Embedding(1, 1)
    else:
        dense = nn.Linear(1, 1, bias="bias" in module)
        if "bias" in module:
            dense.bias = module.bias.astype(dtype)
    dense.weight = weight
    return dense


def apply_precision(model: nn.Module, precision: Precision) -> None:
    """Bring a freshly loaded model into the form of `precision`, in place, module by module."""
    if precision.dense:
        use_fast_swiglu(model)
        quantized = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
        ]
        while quantized:
            name, module = quantized.pop()
            dense = _expanded(module, precision.dtype)
            mx.eval(dense.parameters())
            model.update_modules(tree_unflatten([(name, dense)]))
            del module
    # Packed weights stay as they are, scales and biases included; the rest follows their dtype.
    parameters = dict(tree_flatten(model.parameters()))
    packed = {n.removesuffix("scales") for n in parameters if n.endswith(".scales")}
    kinds = (parameters[f"{n}scales"].dtype for n in sorted(packed))
    dtype = next((d for d in kinds if mx.issubdtype(d, mx.floating)), precision.dtype)
    kept = {f"{n}{leaf}" for n in packed for leaf in ("weight", "scales", "biases")}
    while parameters:  # one by one: no two copies of more than one array
        name, value = parameters.popitem()
        if name not in kept and mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(dtype)
            model.update(tree_unflatten([(name, value)]))
        mx.eval(value)
