"""The device MLX computes on, the BLAS it uses on a Linux CPU, and its memory.

Only this room asks which device it is. Import this module before MLX: it loads OpenBLAS.
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

import mlx.core as mx  # noqa: E402  (after OpenBLAS, see above)

OPENBLAS_HINT = (
    "OpenBLAS is not loaded, MLX will be about 50 times slower; "
    "type: apt-get install libopenblas0-pthread"
)


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: the device MLX computes on by default."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


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
    """Bytes a program should stay below on this machine: what Metal recommends, nine tenths of a
    CUDA device's memory, three quarters of the RAM for a CPU."""
    if limit := gpu_working_set():
        return limit
    if device_name() == "cuda":
        return int(0.9 * mx.device_info().get("total_memory", physical_memory()))
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
