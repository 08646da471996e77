"""Figures of crash safety: `python -m tests.crash.torture [PART ...] [--count N]`.

Parts: kill, faults, corruption, signals, determinism, nan, soak, fuzz; all of them by default. Exit
status 1 if anything was lost. `--json FILE` writes the figures.
"""

from tests.crash import harness  # isort: skip  (first: it loads OpenBLAS before MLX)

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.crash import checks, kills
from tests.fuzz import cases

Part = Callable[[harness.World, int, random.Random], dict[str, Any]]
PARTS: dict[str, tuple[Part, int]] = {
    "kill": (kills.kill_matrix, 220),
    "faults": (kills.fault_matrix, 0),
    "corruption": (checks.corruption, 1200),
    "signals": (kills.signals, 50),
    "determinism": (checks.determinism, 5),
    "nan": (checks.not_finite, 0),
    "soak": (checks.soak, 500),
    "fuzz": (cases.fuzz, 2400),
}


def main() -> int:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(prog="tests.crash.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--count", type=int, help="points, runs or examples of a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        world = harness.make_world(Path(place))
        for name in given.parts or PARTS:
            part, count = PARTS[name]
            start = time.monotonic()
            wanted = count if given.count is None else given.count
            figures[name] = part(world, wanted, random.Random(given.seed))
            figures[name]["seconds"] = round(time.monotonic() - start, 1)
            sys.stdout.write(f"{name}: {json.dumps(figures[name])}\n")
            sys.stdout.flush()
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any(part["failures"] for part in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
