"""`manifest.json` lists the sha256 of every file beside it: {"files": {name: sha256}}.

It is written last and verified when the directory is read.
"""

import hashlib
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import json_text, read_json, write_json

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


def check_replaceable(target: Path) -> None:
    """Raise InputError where replacing a directory would delete what was not written as a whole by
    this program: a file, or a directory of something else, as one that holds runs."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: a file, which --force does not replace; choose --output")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InputError(
            f"{target}: has no {MANIFEST}, so it may hold something else than an earlier output, "
            "and --force does not replace it; remove it yourself, or choose --output"
        )


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
    if not isinstance(files, dict) or place.read_bytes() != json_text(manifest).encode():
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
    return hashlib.sha256(json_text(listed).encode()).hexdigest()
