"""What a machine can move and do in a second: Macs by their data sheets, this one measured.

Bandwidths and the arithmetic of M1 and M2 are Apple's own figures. For M3 and M4 Apple gives none:
GPU cores x 128 lanes x 2 x 1.4 GHz.

What 4-bit products reach of that was measured by others, on MLX:

- M1 Max, 512 rows, 6656 to 19968: fp16 17.2 ms, 0.76 of 10.4 TFLOP/s, bf16 30.6 ms, 0.43
  (ml-explore/mlx, pull request 4216): M1 and M2 have no bf16 in hardware;
- M3 Pro, Qwen3-4B, a prompt of 2048 tokens: 615 tokens/s, 0.68 of 6.5 TFLOP/s
  (ml-explore/mlx-lm, pull request 1569).

The M2 is taken to be like the M1, the M4 like the M3, and fp16 on these like bf16.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_grpo.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """The two limits of a roofline."""

    name: str
    bandwidth: float
    """Bytes of memory per second."""
    arithmetic: float
    """FLOPs per second of a large matmul."""
    measured: bool = False
    reached: float | None = None
    """Share of its limits that 4-bit products reach; None where that is not known."""


THIS = "this"
WITHOUT_BF16 = {mx.float16: 0.76, mx.bfloat16: 0.43}
WITH_BF16 = {mx.bfloat16: 0.68, mx.float16: 0.68}
"""Shares of the arithmetic by dtype, the one that such a Mac computes in first."""
MACS = {
    name: Device(name, gigabytes * 1e9, teraflops * 1e12)
    for name, gigabytes, teraflops in (
        ("m1", 68, 2.6),
        ("m1-pro", 200, 5.2),
        ("m1-max", 400, 10.4),
        ("m1-ultra", 800, 21.0),
        ("m2", 100, 3.6),
        ("m2-pro", 200, 6.8),
        ("m2-max", 400, 13.6),
        ("m2-ultra", 800, 27.2),
        ("m3", 100, 3.6),
        ("m3-pro", 150, 6.5),
        ("m3-max", 400, 14.3),
        ("m4", 120, 3.6),
        ("m4-pro", 273, 7.2),
        ("m4-max", 546, 14.3),
    )
}


def check_name(name: str) -> None:
    """Raise InputError unless there is such a device."""
    if name not in (THIS, *MACS):
        raise InputError(f"--device: must be {THIS} or one of {', '.join(MACS)}, not '{name}'")


def device(name: str, dtype: mx.Dtype | None = None) -> Device:
    """A named Mac, or this machine, measured (a few seconds), with matrices of `dtype`; None means
    what a Mac computes in unless told."""
    if name == THIS:
        return Device("this machine", *machine_limits(dtype or mx.float32), measured=True)
    shares = WITHOUT_BF16 if name.startswith(("m1", "m2")) else WITH_BF16
    share = next(iter(shares.values())) if dtype is None else shares.get(dtype)
    return replace(MACS[name], reached=share)


def machine_limits(dtype: mx.Dtype) -> tuple[float, float]:
    """(bytes/s, FLOP/s) this machine reaches: the best of three ways to read 256 MB (a product with
    one row, with six, a copy that also writes them), and a square matrix product."""
    wide = mx.random.normal((8192, (256 << 20) // 8192 // dtype.size)).astype(dtype)
    one, six = (mx.ones((rows, wide.shape[1]), dtype) for rows in (1, 6))
    square = mx.random.normal((2048, 2048)).astype(dtype)
    mx.eval(wide, one, six, square)
    products = (seconds_of(lambda: one @ wide.T), seconds_of(lambda: six @ wide.T))
    read = min(*products, seconds_of(lambda: wide * 2) / 2)
    return wide.nbytes / read, 2 * 2048**3 / seconds_of(lambda: square @ square)


def seconds_of(f: Callable[[], mx.array]) -> float:
    """The fastest of five evaluations."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(f())
        best = min(best, time.perf_counter() - start)
    return best
