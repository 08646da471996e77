"""Seconds that the check at load takes.

usage: python bench/speed/check_at_load.py [MODEL DIRECTORY]

Defaults to the converted weights of `make demo`. The weights are read before; the fastest of five.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)

import sys
import time
from pathlib import Path

import mlx.core as mx

from mlx_grpo.models.backbone import load_alone
from mlx_grpo.models.check import check_decoder
from mlx_grpo.models.decoder import Decoder

RUNS = 5


def main(directory: str = "weights/sft-4bit") -> None:
    model = load_alone(Path(directory))
    mx.eval(model.parameters())
    found = []
    for _ in range(RUNS):
        start, before = time.perf_counter(), time.process_time()
        check_decoder(Decoder(model))
        found.append((time.perf_counter() - start, time.process_time() - before))
    seconds, processor = map(min, zip(*found, strict=True))
    print(
        f"check at load of {directory}: {seconds:.2f} s, {processor:.2f} s of processor time "
        f"(fastest of {RUNS})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
