"""Files and directories are complete or absent."""

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.files import atomic as files
from mlx_grpo.files.atomic import (
    atomic_directory,
    clear_debris,
    need_space,
    read_json,
    write_json,
    write_text,
)
from mlx_grpo.files.manifest import directory_digest, sha256, verify_manifest, write_manifest


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 9000])
def test_sha256_is_the_digest_of_the_bytes(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    assert sha256(file) == hashlib.sha256(content).hexdigest()


def test_a_directory_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("2")
        assert not target.exists()
        assert temporary.parent == target.parent  # a rename across file systems is not atomic
    assert names(target.parent) == ["out"]
    assert (target / "sub" / "b").read_text() == "2"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("keep")
    with (
        pytest.raises(InputError, match="already exists; remove it or choose another directory"),
        atomic_directory(target),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["mine"]


def test_replacing_leaves_no_file_of_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("old", "new"):
        with atomic_directory(target, replace=True) as temporary:
            (temporary / name).write_text(name)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_failed_replacement_keeps_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_a_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "latest"
    write_text(file, "old")
    monkeypatch.setattr(files, "fsync_path", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_text(file, "née")
    assert file.read_text(encoding="utf-8") == "née"
    assert names(tmp_path) == ["latest"]


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=f"{name}: a pipe or a device; give a regular file"):
            write_text(tmp_path / name, "text")
        assert not (tmp_path / name).is_file()
    assert names(tmp_path) == ["link", "pipe"]


def test_json_is_written_with_a_fixed_order_and_reads_back_the_same_bits(tmp_path: Path) -> None:
    value = {"b": [0.1 + 0.2, 5e-324, None], "a": {"ü": True}}
    write_json(tmp_path / "x.json", value)
    write_json(tmp_path / "y.json", dict(reversed(value.items())))
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_json(file)
    assert str(refusal.value).startswith(f"{file}: {message}")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A directory with a manifest."""
    place = tmp_path / "listed"
    (place / "sub").mkdir(parents=True)
    (place / "a.bin").write_bytes(bytes(100))
    (place / "sub" / "b.txt").write_text("b")
    (place / ".cache").write_text("not part of it")
    write_manifest(place, {"made": "here"})
    return place


def test_a_manifest_lists_what_is_there_and_is_found_whole(listed: Path) -> None:
    manifest = verify_manifest(listed)
    assert manifest["made"] == "here"
    assert manifest["files"] == {n: sha256(listed / n) for n in ("a.bin", "sub/b.txt")}
    write_manifest(listed, {"made": "here"})  # again: it does not list itself
    assert verify_manifest(listed) == manifest
    (listed / "README.md").write_text("what is not listed may come and go")
    assert verify_manifest(listed) == manifest


def test_without_a_manifest_there_is_nothing_to_verify(listed: Path) -> None:
    (listed / "manifest.json").unlink()
    (listed / "a.bin").write_bytes(b"other")
    assert verify_manifest(listed) == {}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: (d / "a.bin").write_bytes(bytes(99)), r"a\.bin: does not match manifest\.json"),
        (lambda d: (d / "sub" / "b.txt").unlink(), r"sub/b\.txt: missing, but manifest\.json"),
        (lambda d: (d / "manifest.json").write_text("{}"), r"manifest\.json: damaged"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: not valid JSON"),
        (
            lambda d: (d / "manifest.json").write_bytes(
                (d / "manifest.json").read_bytes().rstrip(b"\n")
            ),
            r"manifest\.json: damaged",
        ),
    ],
)
def test_damage_is_found_and_the_file_named(
    listed: Path, damage: Callable[[Path], Any], complaint: str
) -> None:
    damage(listed)
    with pytest.raises(InputError, match=complaint):
        verify_manifest(listed)


def test_a_digest_is_of_names_and_contents(listed: Path) -> None:
    with_manifest = directory_digest(listed)
    (listed / "manifest.json").unlink()
    assert directory_digest(listed) == with_manifest
    (listed / "a.bin").rename(listed / "c.bin")
    assert directory_digest(listed) != with_manifest


def test_what_a_dead_process_left_is_finished_or_removed(tmp_path: Path) -> None:
    for name in (".best.old", ".final.old", "final", ".step-1.x.tmp", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    (tmp_path / ".latest.tmp").write_text("half")
    (tmp_path / ".lock").write_text("1")
    clear_debris(tmp_path)
    assert names(tmp_path) == [".lock", "best", "final", "kept"]
    assert (tmp_path / "best" / "from").read_text() == ".best.old"
    assert (tmp_path / "final" / "from").read_text() == "final"


def test_too_little_space_is_told_with_the_remedy(tmp_path: Path) -> None:
    need_space(tmp_path / "not" / "there", 1, "free some")
    with pytest.raises(InputError, match=r"MB free on its disk, 1,000,000,000,000 MB needed; free"):
        need_space(tmp_path / "not" / "there", 10**18, "free some")


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    orphan, other = tmp_path / f".out.{dead.pid}.abc.tmp", tmp_path / f".out.{os.getpid()}.abc.tmp"
    stranger = tmp_path / ".out.notes.tmp"
    for directory in (orphan, other, stranger):
        directory.mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert not orphan.exists() and other.exists() and stranger.exists()
