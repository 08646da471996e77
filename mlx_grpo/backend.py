"""Where the arithmetic happens: BLAS on Linux CPUs, the compute policy, memory figures.

One policy object decides how frozen weights are held; nothing else in the package asks what the
device is.

- Metal and CUDA: the packed weights stay packed, MLX's quantized kernels do the work, activations
  are bf16.
- Linux CPU: MLX's 4-bit and bf16 kernels are 10 to 100 times slower than an fp32 BLAS, so the
  frozen weights are expanded once to fp32 (the same values), and hold the LoRA too while answers
  are sampled; its exponentials are slow too, so `swiglu` and `exp_rows` go around them.
"""

import ctypes
import os
import sys
from dataclasses import dataclass


def _load_openblas() -> str | None:
    """Load OpenBLAS before MLX: its symbols take the place of the slow BLAS in `mlx-cpu`.

    Returns the library's name, or None where there is none (macOS needs none: Accelerate is
    linked).
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:  # loaded: its symbols are bound
        return None
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


OPENBLAS = _load_openblas()

import mlx.core as mx  # noqa: E402  (after OpenBLAS, see above)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

LOG2_E = 1.4426950408889634

OPENBLAS_HINT = (
    "OpenBLAS is not loaded, MLX will be about 50 times slower; "
    "type: apt-get install libopenblas0-pthread"
)

EXPANDED_BYTES = 32 << 20
"""Of fp32 values that are unpacked at a time."""


@dataclass(frozen=True)
class ComputePolicy:
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


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: the device MLX computes on by default."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def on_linux_cpu() -> bool:
    """Whether MLX needs OpenBLAS to be fast and g++ to compile kernels at run time."""
    return sys.platform == "linux" and device_name() == "cpu"


def gpu_working_set() -> int | None:
    """Bytes that Metal recommends to keep within; a Mac's owner can raise them."""
    if device_name() != "metal":
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def physical_memory() -> int:
    """Bytes of RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_policy(parameters: int) -> ComputePolicy:
    """Packed weights on a GPU; on a CPU dense fp32 while it fits in half the RAM."""
    return policy_for(device_name() == "cpu" and parameters * 4 < physical_memory() / 2)


def policy_for(dense: bool) -> ComputePolicy:
    """The policy of this machine with weights expanded or packed."""
    device = device_name()
    return ComputePolicy(device, dense, mx.float32 if device == "cpu" else mx.bfloat16)


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


def apply_policy(model: nn.Module, policy: ComputePolicy) -> None:
    """Bring a freshly loaded model into the form of `policy`, in place, module by module."""
    if policy.dense:
        use_fast_swiglu(model)
        quantized = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
        ]
        while quantized:
            name, module = quantized.pop()
            dense = _expanded(module, policy.dtype)
            mx.eval(dense.parameters())
            model.update_modules(tree_unflatten([(name, dense)]))
            del module
    # Packed weights stay as they are, scales and biases included; the rest follows their dtype.
    parameters = dict(tree_flatten(model.parameters()))
    packed = {n.removesuffix("scales") for n in parameters if n.endswith(".scales")}
    dtype = next((parameters[f"{n}scales"].dtype for n in sorted(packed)), policy.dtype)
    if not mx.issubdtype(dtype, mx.floating):
        dtype = policy.dtype
    kept = {f"{n}{leaf}" for n in packed for leaf in ("weight", "scales", "biases")}
    while parameters:  # one by one: no two copies of more than one array
        name, value = parameters.popitem()
        if name not in kept and mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(dtype)
            model.update(tree_unflatten([(name, value)]))
        mx.eval(value)


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


def recommended_memory() -> int:
    """Bytes a program should stay below on this machine: what Metal recommends, nine tenths of a
    CUDA device's memory, three quarters of the RAM for a CPU."""
    if limit := gpu_working_set():
        return limit
    if device_name() == "cuda":
        return int(0.9 * mx.device_info().get("memory_size", physical_memory()))
    return physical_memory() * 3 // 4


def limit_memory(limit: int, fixed: int) -> None:
    """Hold MLX to a limit, in bytes.

    Above it MLX waits for what runs before it allocates more, and gives cached buffers back.

    Args:
        fixed: bytes that stay; unused buffers are kept for the rest at most.
    """
    mx.set_memory_limit(limit)
    mx.set_cache_limit(max(0, limit - fixed))
    if recommended := gpu_working_set():
        mx.set_wired_limit(min(limit, recommended))


def peak_memory() -> int:
    """Bytes at MLX's highest since the last `reset_peak_memory`."""
    return int(mx.get_peak_memory())
