"""Files and directories that are either complete or absent, JSON, disk space.

Protocol for a directory: write into a temporary sibling, fsync every file, rename, fsync the
parent.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.limits import check_regular, read_bounded

LARGEST_JSON = 256 << 20
"""Bytes; the largest tokenizers take 40 million."""


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk; macOS keeps it in the drive's cache unless asked
    for more than fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush every file below `directory`, then the directories."""
    for root, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `target` that takes its name if the block ends well.

    Raises:
        InputError: `target` exists and `replace` is false.
    """
    if target.exists() and not replace:
        raise InputError(f"{target}: already exists; remove it or choose another directory")
    missing = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(target)
    unique = f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporary = target.parent / unique
    temporary.mkdir()  # not mkdtemp: who may read it is the umask's to say
    try:
        yield temporary
        fsync_tree(temporary)
        swap_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            if not any(parent.iterdir()):
                parent.rmdir()


def _remove_orphans(target: Path) -> None:
    """Remove unfinished versions of `target` whose process, named by its number, is dead."""
    for unfinished in target.parent.glob(f".{target.name}.*.*.tmp"):
        process = unfinished.name.split(".")[-3]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(unfinished)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def swap_directory(new: Path, target: Path) -> None:
    """Give `new` the name `target`; what was there before is moved aside first and removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_debris(directory: Path) -> None:
    """Finish what a process that died left in `directory`; only while no other process writes.

    A directory moved aside gets its name back if its successor never took it; the rest goes.
    """
    for old in directory.glob(".*.old"):
        target = directory / old.name[1 : -len(".old")]
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for unfinished in directory.glob(".*.tmp"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink()


def need_space(directory: Path, size: int, remedy: str) -> None:
    """Raise InputError unless the disk that holds `directory` has `size` bytes free."""
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise InputError(
            f"{directory}: {free / 1e6:,.0f} MB free on its disk, {size / 1e6:,.0f} MB needed; "
            f"{remedy}"
        )


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Replace a file by `text`, whole or in pieces, in one step.

    Raises:
        InputError: there is a pipe or a device, which must not be replaced.
    """
    check_regular(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
    fsync_path(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON with a fixed key order."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, too large, is not JSON, or holds something else than an
            object.
    """
    try:
        value = json.loads(read_bounded(path, LARGEST_JSON).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # nesting without end, numbers of many digits
        raise InputError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return value
