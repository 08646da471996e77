"""The product for few rows: its largest error against float64, and how fast the weights are read.

usage: python -m bench.blas.check; sh bench/blas/with.sh python -m bench.blas.check
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import time

import mlx.core as mx
import numpy as np

SHAPES = ((576, 576), (576, 1536), (1536, 576), (576, 49152), (100, 65))
"""[K, N] of SmolLM2-135M's layers and its head, and one that no tile divides."""
ROWS = (1, 6, 12, 13, 24, 48, 60)
"""With more than 48 the product is OpenBLAS's."""
BYTES = 2e8
"""Weights that no cache holds."""


def error(m: int, k: int, n: int) -> float:
    """Largest difference from the product in float64, over its largest entry."""
    x_MK, w_NK = mx.random.normal((m, k)), mx.random.normal((n, k))
    exact = np.array(x_MK).astype(np.float64) @ np.array(w_NK).astype(np.float64).T
    return float(np.abs(np.array(x_MK @ w_NK.T) - exact).max() / np.abs(exact).max())


def speed(m: int, k: int, n: int) -> float:
    """Bytes of weights a second, the faster of two turns."""
    matrices = [mx.random.normal((n, k)) for _ in range(max(1, round(BYTES / (4 * n * k))))]
    x_MK, seconds = mx.random.normal((m, k)), []
    mx.eval(matrices, x_MK)
    for _ in range(2):
        start = time.perf_counter()
        for w_NK in matrices:
            mx.eval(x_MK @ w_NK.T)
        seconds.append(time.perf_counter() - start)
    return 4 * n * k * len(matrices) / min(seconds)


def main() -> None:
    print("rows        K -> N   error      GB/s")
    for m in ROWS:
        for k, n in SHAPES:
            print(f"{m:4} {k:8} -> {n:5}   {error(m, k, n):.1e}   {speed(m, k, n) / 1e9:5.1f}")


if __name__ == "__main__":
    main()
