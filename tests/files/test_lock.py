"""One run per directory, and a dead process holds nothing."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.files.lock import locked


def hold(directory: Path, ready: Any) -> None:
    with locked(directory):
        (directory / "file").touch()
        ready.set()
        signal.pause()


def test_the_holder_is_named_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    holder = spawn.Process(target=hold, args=(tmp_path / "run", ready))
    holder.start()
    assert ready.wait(60)
    refusal = pytest.raises(InputError, match=rf"run: in use by process {holder.pid}; wait")
    with refusal, locked(tmp_path / "run"):
        pytest.fail("two at once")
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["file"]


def test_what_it_made_goes_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "deep" / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for _ in range(2):
        with locked(tmp_path / "run"):
            pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match=r"run: not a directory"), locked(tmp_path / "run"):
        pytest.fail("locked a file")
