"""The device MLX computes on, the BLAS it uses on a Linux CPU, and its memory.

Only this room asks which device it is. Import this module before MLX: it loads OpenBLAS and keeps
fp32 products exact.
"""

import ctypes
import os
import sys


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
# MLX multiplies fp32 matrices in TF32 where a GPU has it: log-probs that differ in the third digit
# from one kernel to the next. fp32 is asked for where the digits matter.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx  # noqa: E402  (after OpenBLAS, see above)

SAFE_SHARE = 0.85
PROCESS_BYTES = 600_000_000
"""Of the interpreter, the tokenizer and Metal's pipelines; an estimate, not measured on a Mac."""
CACHE_BYTES = 1 << 30
OPENBLAS_HINT = (
    "OpenBLAS is not loaded, MLX will be about 50 times slower; "
    "type: apt-get install libopenblas0-pthread"
)


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: the device MLX computes on by default."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def on_macos() -> bool:
    """Whether this is a Mac."""
    return sys.platform == "darwin"


def on_linux_cpu() -> bool:
    """Whether MLX needs OpenBLAS to be fast and g++ to compile kernels at run time."""
    return sys.platform == "linux" and device_name() == "cpu"


def has_bf16() -> bool:
    """Whether the device multiplies matrices in bf16. M1 and M2 (GPU generations 13 and 14) do so
    at 0.6 of fp16's speed (ml-explore/mlx, pull request 4216)."""
    if device_name() != "metal":
        return True
    architecture = str(mx.device_info().get("architecture", ""))  # such as applegpu_g14s
    return not architecture.startswith(("applegpu_g13", "applegpu_g14"))


def gpu_working_set() -> int | None:
    """Bytes that Metal recommends to keep within; a Mac's owner can raise them."""
    if device_name() != "metal":
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def physical_memory() -> int:
    """Bytes of RAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def recommended_memory() -> int:
    """Bytes MLX should stay below on this machine, see `share_for_mlx`; three quarters of the RAM
    for a CPU."""
    if limit := gpu_working_set():
        return share_for_mlx(limit)
    if device_name() == "cuda":
        return int(SAFE_SHARE * mx.device_info().get("total_memory", physical_memory()))
    return physical_memory() * 3 // 4


def share_for_mlx(working_set: int) -> int:
    """Of what Metal recommends a program to stay below, what MLX may plan with: from 0.95 of it on
    MLX reclaims buffers, and the process holds more than MLX's arrays."""
    return int(SAFE_SHARE * working_set) - PROCESS_BYTES


def limit_memory(limit: int, fixed: int) -> None:
    """Hold MLX to a limit, in bytes.

    Above it MLX waits for what runs before it allocates more, and gives cached buffers back.

    Args:
        fixed: bytes that stay; unused buffers are kept for the rest at most, up to a GiB: a buffer
            serves again only where nearly the same size is asked for.
    """
    mx.set_memory_limit(limit)
    mx.set_cache_limit(max(0, min(CACHE_BYTES, limit - fixed)))
    if recommended := gpu_working_set():
        mx.set_wired_limit(min(limit, recommended))


def cached_memory() -> int:
    """Bytes of buffers that MLX keeps for later; the peak does not count them."""
    return int(mx.get_cache_memory())


def peak_memory() -> int:
    """Bytes at MLX's highest since the last `reset_peak_memory`."""
    return int(mx.get_peak_memory())
