"""Bounds on what files and programs from elsewhere may take."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mlx_grpo.core.errors import InputError


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken so long; in the main thread only, for
    Python delivers signals to no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_regular(path: Path) -> None:
    """Raise InputError for a pipe or a device, which may never end, where a file is expected."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: a pipe or a device; give a regular file")


def check_directory(directory: Path) -> None:
    """Raise InputError if a model directory holds a pipe or a device."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        check_regular(path)


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: it is larger than `most` bytes, or no regular file: a pipe may never end.
        OSError: it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path}: larger than {most / 1e6:,.0f} MB, which no such file needs")
    return content
