"""Strike at the n-th file operation of this process: die there, or fail there.

Every call that changes a file or directory counts: open for writing, write, fsync, rename, replace,
mkdir, unlink, rmdir, chmod, truncate. A write that is struck has written half of its bytes.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "truncate")
Strike = Callable[[str], None]


def die(operation: str) -> None:
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_with(number: int) -> Strike:
    """Raise the OSError of an errno."""

    def fail(operation: str) -> None:
        raise OSError(number, os.strerror(number), operation)

    return fail


def install(strike_at: int, strike: Strike, seen: Callable[[str], None]) -> None:
    """Count the operations of this process from now on; 0 strikes nowhere.

    Args:
        seen: told the name of each operation.
    """
    count = 0

    def due(operation: str) -> bool:
        nonlocal count
        count += 1
        seen(operation)
        return count == strike_at

    for name in CALLS:
        setattr(os, name, _counted(getattr(os, name), name, due, strike))

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if due("write"):
                super().write(memoryview(data)[: len(data) // 2])
                strike("write")
            return super().write(data)

    real_open = io.open

    def counted_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if mode.strip("bt") not in ("w", "a", "x"):
            return real_open(file, mode, *rest, **named)
        if due("open"):
            strike("open")
        raw = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    io.open = builtins.open = counted_open  # type: ignore[assignment]


def _counted(
    real: Callable[..., Any], name: str, due: Callable[[str], bool], strike: Strike
) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        if due(name):
            strike(name)
        return real(*arguments, **named)

    return counted
