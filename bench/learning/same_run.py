"""Do two runs agree up to an iteration, though one of them was killed on the way?

usage: python -m bench.learning.same_run RUN OTHER --at 100

Compares the checkpoint of that iteration by hash, and metrics, completions and held-out answers up
to it line by line. Left out are times, memory, and where the runs lie.
"""

import argparse
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.manifest import sha256
from mlx_grpo.run import log

TABLES = (log.METRICS, log.COMPLETIONS, log.EVAL_COMPLETIONS)


def hashes(run: Path, iteration: int) -> dict[str, str]:
    """Of the weights and the optimizer of a checkpoint.

    Raises:
        InputError: it is not there.
    """
    directory = run / "checkpoints" / f"step-{iteration:06d}"
    found = {file.name: sha256(file) for file in sorted(directory.glob("*.safetensors"))}
    if not found:
        raise InputError(
            f"{directory}: no checkpoint here; give the iteration of another with --at"
        )
    return found


def rows(run: Path, table: str, iteration: int) -> list[dict[str, Any]]:
    """Lines of a table up to an iteration, without what is a machine's own."""
    return [log.repeatable(row) for row in log.read(run / table) if row["step"] <= iteration]


def compare(one: Path, other: Path, iteration: int, ui: Console) -> bool:
    """Say what was compared; whether all of it is equal."""
    left, right = (hashes(run, iteration) for run in (one, other))
    for name, found in left.items():
        ui.say(f"{name}  {found[:16]}  {right.get(name, 'missing')[:16]}")
    equal = left == right
    for table in TABLES:
        before, after = (rows(run, table, iteration) for run in (one, other))
        ui.say(f"{table}: {len(before)} and {len(after)} lines, {_told(before, after)}")
        equal = equal and before == after
    ui.say("the same run" if equal else "NOT the same run")
    return equal


def _told(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    if before == after:
        return "equal"
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    return f"differ from line {1 + sum(1 for _ in equal)}"


def main() -> int:
    """1 if anything differs."""
    given = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given.add_argument("runs", type=Path, nargs=2)
    given.add_argument("--at", type=int, required=True, help="iteration of a checkpoint of both")
    args, ui = given.parse_args(), Console()
    try:
        return 0 if compare(*args.runs, args.at, ui) else 1
    except InputError as e:
        ui.error(str(e))
        return 2


if __name__ == "__main__":
    sys.exit(main())
