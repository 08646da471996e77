"""Compile the kernels of quantized products before they are timed, many at a time.

usage: python -m bench.gpu.kernels [--json FILE]

MLX compiles them at run time on CUDA, 10 to 30 seconds each, and keeps them on disk.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import mlx.core as mx

INPUTS, OUTPUTS, GROUP = 2048, 4096, 64
ROWS = (16, 32, 64)
"""MLX has a kernel for tiles of each of these; fewer than eight rows take one that is built in."""


def compile_one(dtype: str, transpose: bool, rows: int) -> None:
    """A product of every kind that a run asks for."""
    kind = getattr(mx, dtype)
    packed = mx.quantize(mx.random.normal((OUTPUTS, INPUTS)).astype(kind), GROUP, 4)
    x = mx.random.normal((1, rows, INPUTS if transpose else OUTPUTS)).astype(kind)
    mx.eval(mx.quantized_matmul(x, *packed, transpose=transpose, group_size=GROUP, bits=4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=3, metavar=("DTYPE", "TRANSPOSE", "ROWS"))
    args = parser.parse_args()
    if args.only:
        compile_one(args.only[0], args.only[1] == "1", int(args.only[2]))
        return
    kinds = list(product(("bfloat16", "float16", "float32"), ("1", "0"), map(str, ROWS)))

    def child(kind: tuple[str, str, str]) -> tuple[int, float]:
        start = time.perf_counter()
        command = [sys.executable, "-m", "bench.gpu.kernels", "--only", *kind]
        return subprocess.run(command).returncode, time.perf_counter() - start

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(child, kinds))
    figures = {
        " ".join(k): {"code": c, "seconds": s} for k, (c, s) in zip(kinds, found, strict=True)
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(code for code, _ in found))


if __name__ == "__main__":
    main()
