"""The logs of a run, `LOGS`: one JSON object a line, appended, never rewritten; cut back only on
resume, to what they held at the checkpoint.

Metric names are TRL's where TRL has one. Times are in seconds under `time/`, memory in bytes under
`memory/`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import fsync_path

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
EVAL_COMPLETIONS = "eval_completions.jsonl"
SKIPPED = "skipped.jsonl"
EVAL_ANSWERS = "eval_answers.jsonl"
"""Held-out answers as people are shown them: one per prompt, at --eval-temperature."""
LOGS = (METRICS, COMPLETIONS, EVAL_COMPLETIONS, SKIPPED, EVAL_ANSWERS)


def append(path: Path, *rows: dict[str, Any]) -> None:
    """Append objects as lines and hand them to the operating system at once."""
    with path.open("a", encoding="utf-8") as f:
        f.write("".join(json.dumps(as_written(row), ensure_ascii=False) + "\n" for row in rows))


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """The row as `read` gives it back: JSON has no name for NaN and infinity, so they are null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def figure(value: float | None, form: str) -> str:
    """A figure of a row in words; null stands for one that was not finite."""
    return "not finite" if value is None else format(value, form)


def sizes(run: Path) -> dict[str, int]:
    """Bytes of each log of a run, 0 where there is none."""
    files = {name: run / name for name in LOGS}
    return {name: f.stat().st_size if f.exists() else 0 for name, f in files.items()}


def flush(run: Path) -> None:
    """Bring the logs of a run to disk."""
    for name in LOGS:
        if (run / name).exists():
            fsync_path(run / name)


def cut(path: Path, size: int) -> None:
    """Drop all that was appended after a log had `size` bytes; a log of 0 bytes is removed."""
    if not size:
        path.unlink(missing_ok=True)
    elif path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a log.

    Raises:
        InputError: a line is not a JSON object.
    """
    # not splitlines(): it also splits at characters that JSON leaves inside a text
    *whole, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_row(f"{path}:{number}", line) for number, line in enumerate(whole, 1)]


def repeatable(row: dict[str, Any]) -> dict[str, Any]:
    """What the same run gives again: a row without times and memory."""
    return {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}


def _whole(digits: str) -> float:
    """A whole number; one that 64 bits cannot hold as the float it would be in a computation."""
    return int(digits) if len(digits) < 20 else float(digits)


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_int=_whole)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{place}: not valid JSON ({e}); restore the file or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: must be a JSON object, not {type(row).__name__}")
    return row
