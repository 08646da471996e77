"""JSONL rows; every complaint names file, line and field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for each line that is not blank.

    Raises:
        InputError: the file is missing, a line is not JSON or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(
                f"{path}:{number}: not valid JSON ({e.msg}; column {e.colno})"
            ) from None
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, deep nesting
            raise InputError(f"{path}:{number}: not usable JSON ({e})") from None
        try:
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell what no text can hold
            raise InputError(
                f"{path}:{number}: a \\ud... escape stands alone; surrogates come in pairs"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
        yield f"{path}:{number}", row
