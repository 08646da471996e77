"""Do two runs agree up to an iteration, though one of them was killed on the way?

usage: python -m bench.learning.same_run RUN OTHER --at 100

Compares the checkpoint of that iteration by hash, and metrics, completions and held-out answers up
to it line by line. Left out are times, memory, and where the runs lie.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TABLES = ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl")
OWN = ("time/", "memory/")


def hashes(run: Path, iteration: int) -> dict[str, str]:
    """SHA-256 of the weights and the optimizer of a checkpoint."""
    files = sorted((run / "checkpoints" / f"step-{iteration:06d}").glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows(run: Path, table: str, iteration: int) -> list[dict[str, Any]]:
    """Lines of a table up to an iteration, without what is a machine's own."""
    lines = [json.loads(line) for line in (run / table).read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(OWN)}
        for line in lines
        if line["step"] <= iteration
    ]


def main() -> int:
    """Print what was compared; 1 if anything differs."""
    given = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given.add_argument("runs", type=Path, nargs=2)
    given.add_argument("--at", type=int, required=True, help="iteration of a checkpoint of both")
    args = given.parse_args()
    one, other = (hashes(run, args.at) for run in args.runs)
    if not one or not other:
        print(f"no checkpoint of iteration {args.at} in one of them")
        return 2
    equal = one == other
    for name, found in one.items():
        print(f"{name}  {found[:16]}  {other.get(name, 'missing')[:16]}")
    for table in TABLES:
        left, right = (rows(run, table, args.at) for run in args.runs)
        differ = [i for i, (a, b) in enumerate(zip(left, right, strict=False), 1) if a != b]
        same = len(left) == len(right) and not differ
        told = (
            "equal"
            if same
            else f"differ at line {differ[0] if differ else min(len(left), len(right)) + 1}"
        )
        print(f"{table}: {len(left)} and {len(right)} lines, {told}")
        equal = equal and same
    print("the same run" if equal else "NOT the same run")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
