"""Seconds from the command to the first token of the first rollout.

usage: python bench/speed/startup.py [TRAIN FLAGS ...]

Starts `mlx-grpo train --dry-run` with the flags in a process of its own and stops it when the first
token has been drawn; the fastest of three. Defaults to the converted weights of `make demo`.
"""

import subprocess
import sys
import time

CHILD = """
import os, sys, time
from mlx_grpo import cli
from mlx_grpo.cli.options import with_models

@with_models  # imports what a command imports, in the same way
def watch():
    import mlx.core as mx
    from mlx_grpo.grpo import rollout
    drawn = rollout.sample
    def first(*args):
        result = drawn(*args)
        mx.eval(result)
        print(f"FIRST {time.time()}", flush=True)
        os._exit(0)
    rollout.sample = first

watch()
sys.argv = ["mlx-grpo", "train", "--dry-run", "--quiet", *sys.argv[1:]]
cli.main()
"""
RUNS = 3


def main() -> None:
    best = float("inf")
    for _ in range(RUNS):
        start = time.time()
        command = [sys.executable, "-c", CHILD, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        marks = [line for line in done.stdout.splitlines() if line.startswith("FIRST")]
        if not marks:
            sys.exit("no token was drawn")
        best = min(best, float(marks[0].split()[1]) - start)
    print(f"command to first rollout token: {best:.1f} s (fastest of {RUNS})")


if __name__ == "__main__":
    main()
