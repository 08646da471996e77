"""metrics.jsonl and completions.jsonl: one JSON object a line, appended, never rewritten; cut back
only on resume.

Metric names are TRL's where TRL has one. Times are in seconds under `time/`, memory in bytes under
`memory/`.
"""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"


def append(path: Path, *rows: dict[str, Any]) -> None:
    """Append objects as lines and hand them to the operating system at once."""
    with path.open("a", encoding="utf-8") as f:
        f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def truncate(path: Path, iteration: int) -> None:
    """Keep the lines up to and including `iteration`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    *whole, _torn = path.read_text(encoding="utf-8").split("\n")
    for line in whole:
        if json.loads(line)["step"] > iteration:
            break
        kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a log."""
    # not splitlines(): it also splits at characters that JSON leaves inside a text
    *whole, _torn = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]
