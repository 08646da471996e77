"""One run per directory: a lock that the operating system releases when its process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mlx_grpo.core.errors import InputError

LOCK = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory/.lock` while the block runs.

    The directory is made if need be, and removed again if the block left nothing in it.

    Raises:
        InputError: another process holds it; its number is named.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory; choose another --output")
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    file = _acquire(directory / LOCK)
    try:
        yield
    finally:
        if mine(directory):
            (directory / LOCK).unlink()
        file.close()
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def mine(directory: Path) -> bool:
    """Whether this process holds the lock of what is now at `directory`: not if the directory that
    it locked was moved or deleted, or another put in its place."""
    try:
        return (directory / LOCK).read_text(encoding="utf-8") == f"{os.getpid()}\n"
    except OSError:
        return False


def held(directory: Path) -> bool:
    """Whether a process, this one included, is at work in `directory`."""
    if not (directory / LOCK).is_file():
        return False
    with (directory / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _acquire(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "of an unknown number"
            file.close()
            raise InputError(
                f"{path.parent}: in use by process {holder}; wait for its end or choose another "
                "--output"
            ) from None
        # the holder before may have removed the file between our opening and our locking it
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
