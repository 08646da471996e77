"""Files that are either complete or absent: atomic directories, manifests, JSON, disk space.

Protocol for a directory: write into a temporary sibling, fsync every file, rename, fsync the
parent. `manifest.json` lists the sha256 of every file beside it: {"files": {name: sha256}}.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_grpo.errors import InputError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int]:
    """(inode, bytes, time of the last change): another one means another content."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


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
    prefix = f".{target.name}.{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
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


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON with a fixed key order."""
    write_text(path, _json_text(value))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return value


def asset(name: str) -> Path:
    """A file that ships with the project: in the package, or in the checkout around it.

    Raises:
        InputError: neither is there.
    """
    package = Path(__file__).parent
    for base in (package / "assets", package.parent):
        if (base / name).exists():
            return base / name
    raise InputError(f"{name}: not found beside the package; install mlx-grpo again")


def write_manifest(directory: Path, about: dict[str, Any] | None = None) -> None:
    """Write `manifest.json`: the sha256 of every file below `directory`, hidden ones left out.

    Call it last, when the directory is complete.

    Args:
        about: further fields beside `files`.
    """
    listed = {name: sha256(directory / name) for name in _file_names(directory)}
    write_json(directory / MANIFEST, {**(about or {}), "files": listed})


def _file_names(directory: Path) -> list[str]:
    relative = (p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
    return sorted(
        p.as_posix()
        for p in relative
        if p.as_posix() != MANIFEST and not any(part.startswith(".") for part in p.parts)
    )


def verify_manifest(directory: Path) -> dict[str, Any]:
    """Check every file that `directory/manifest.json` lists; {} where there is no manifest.

    Raises:
        InputError: the manifest is damaged or leads out of the directory, a file is missing or
            differs; the file is named.
    """
    place = directory / MANIFEST
    if not place.is_file():
        return {}
    manifest = read_json(place)
    files = manifest.get("files")
    # it was written by `write_json`, so any other spelling of the same value is damage too
    if not isinstance(files, dict) or place.read_bytes() != _json_text(manifest).encode():
        raise InputError(f"{place}: damaged; fetch or make {directory} again")
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{place}: lists '{name}', which is outside of the directory")
        if not (directory / name).is_file():
            raise InputError(f"{directory / name}: missing, but {place.name} lists it")
        if sha256(directory / name) != expected:
            raise InputError(
                f"{directory / name}: does not match {place.name} (sha256): damaged; if you "
                f"changed it yourself, remove {place.name}"
            )
    return manifest


def directory_digest(directory: Path) -> str:
    """One digest of the names and contents of a directory's files, its manifest left out."""
    manifest = read_json(directory / MANIFEST) if (directory / MANIFEST).is_file() else {}
    listed = manifest.get("files") or {
        name: sha256(directory / name) for name in _file_names(directory)
    }
    return hashlib.sha256(_json_text(listed).encode()).hexdigest()
