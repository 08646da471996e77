"""Figures of crash safety: `python -m tests.crash.torture [PART ...] [--count N]`.

Parts: kill, tools, faults, corruption, signals, determinism, nan, soak, fuzz; all of them by
default. Exit status 1 if anything was lost. `--json FILE` writes the figures.
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
    "tools": (kills.kill_with_tools, 50),
    "faults": (kills.fault_matrix, 0),
    "corruption": (checks.corruption, 1200),
    "signals": (kills.signals, 50),
    "determinism": (checks.determinism, 5),
    "nan": (checks.not_finite, 0),
    "soak": (checks.soak, 500),
    "fuzz": (cases.fuzz, 2400),
}


def summary(figures: dict[str, Any]) -> str:
    """The figures as a table in Markdown, one row a part."""
    f = figures
    rows: dict[str, Callable[[], tuple[str, str]]] = {
        "kill": lambda: (
            f"`kill -9` at {f['kill']['points']} points, {f['kill']['file_operations']} of them "
            "file operations, the others random times in all stages, some runs twice; then "
            "`--resume`: adapter, optimizer, state, metrics, completions equal the uninterrupted "
            "run bit for bit",
            f"{f['kill']['equal']}/{f['kill']['points']}",
        ),
        "tools": lambda: (
            "`kill -9` of a run with tools, then `--resume`: as above",
            f"{f['tools']['equal']}/{f['tools']['points']}",
        ),
        "faults": lambda: (
            "ENOSPC, EIO or EACCES at a file operation: one line with the reason and the way to "
            "go on, the checkpoint before loads; one in eight also resumed, equal",
            f"{f['faults']['contained']}/{f['faults']['faults']}",
        ),
        "corruption": lambda: (
            f"a flipped bit or a cut in one of the {f['corruption']['files']} files of a "
            "checkpoint, a model directory and an adapter: found, the file named",
            f"{f['corruption']['detected']}/{f['corruption']['damages']}",
        ),
        "signals": lambda: (
            "SIGTERM at a random time: resumed equal; seconds to exit of the tiny model, p50 / p99",
            f"{f['signals']['resumed_equal']}/{f['signals']['runs']}; "
            f"{f['signals']['p50_seconds']:.3f} / {f['signals']['p99_seconds']:.3f}",
        ),
        "determinism": lambda: (
            f"{f['determinism']['runs']} runs of one seed: distinct hashes; largest difference in "
            "the trained adapter with other `decode_rows` / other `rows_per_pass`",
            f"{f['determinism']['distinct_hashes']}; {_gap(f, 'decode_rows')} / "
            f"{_gap(f, 'rows_per_pass')}",
        ),
        "nan": lambda: (
            "NaN or infinity as score, log-prob, loss or gradient: weights and normaliser unmoved",
            f"{f['nan']['weights_unchanged']}/{f['nan']['injections']}",
        ),
        "soak": lambda: (
            f"{f['soak']['iterations']} iterations, second against last tenth: resident memory, "
            "open files, bytes of checkpoints",
            ", ".join(
                f"{_short(f['soak'][n][0])} -> {_short(f['soak'][n][1])}"
                for n in ("resident", "descriptors", "checkpoints")
            ),
        ),
        "fuzz": lambda: (
            "malformed prompts, preference pairs, settings and reward returns: accepted or "
            "refused in one line",
            f"{f['fuzz']['one_line']}/{f['fuzz']['inputs']}",
        ),
    }
    lines = [" | ".join(("", *rows[name](), "")).strip() for name in figures]
    return "\n".join(["| what | kept |", "|---|---|", *lines]) + "\n"


def _gap(figures: dict[str, Any], setting: str) -> str:
    found = figures["determinism"]["differences"]
    return f"{max(d['adapter'] for name, d in found.items() if name.startswith(setting)):.1g}"


def _short(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number > 10_000 else str(number)


def main() -> int:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(prog="tests.crash.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--count", type=int, help="points, runs or examples of a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures; adds to what it has")
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
            if given.json:  # after each part: the whole takes a while
                given.json.parent.mkdir(parents=True, exist_ok=True)
                others = json.loads(given.json.read_text()) if given.json.exists() else {}
                given.json.write_text(json.dumps(others | figures, indent=2) + "\n")
    sys.stdout.write(summary(figures))
    return int(any(part["failures"] for part in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
