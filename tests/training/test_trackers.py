"""Figures go where --log says, and no tracker can end a run or spoil it."""

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import TrainConfig, train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.training import trackers
from mlx_grpo.training.loop import train

ROWS = [{"step": 1, "reward": 0.5, "policy/stopped_early": False, "a_word": "text", "kl": None}]


class Tracker(types.ModuleType):
    """What Trackio and Weights & Biases have in common."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **named: Any) -> None:
        self.calls.append(("init", named))

    def log(self, row: dict[str, Any]) -> None:
        self.calls.append(("log", row))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def log_all(config: TrainConfig, run: Path, step: int = 0) -> list[str]:
    """Hand all rows to the trackers; the warnings."""
    warnings: list[str] = []
    with trackers.open_trackers(config, run, step, warnings.append) as tracker:
        for row in ROWS:
            tracker(row)
    return warnings


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_configuration_and_the_numbers(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    assert log_all(train_config(log=(name,), seed=7), tmp_path / "runs" / "seed-7", step=3) == []
    (_, begun), (_, row), (last, _) = tracker.calls
    assert begun["project"] == "mlx-grpo" and begun["name"] == "runs-seed-7"
    assert begun["config"]["seed"] == 7 and begun["resume"] == "allow"
    assert row == {"reward": 0.5, "policy/stopped_early": 0.0, "iteration": 1.0}
    assert last == "finish"


def test_a_new_run_in_an_old_place_does_not_go_on_in_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, run = [Tracker("trackio"), Tracker("wandb")], tmp_path / "runs" / "seed-7"
    for tracker in both:
        monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
    hours = iter("1234")  # each tracker takes its time to open
    monkeypatch.setattr(trackers.time, "strftime", lambda _: next(hours))
    for step in (0, 3):  # begun, resumed
        run.mkdir(parents=True, exist_ok=True)
        assert log_all(train_config(log=("trackio", "wandb")), run, step) == []
    shutil.rmtree(run)
    run.mkdir()
    log_all(train_config(log=("trackio", "wandb")), run)
    names = [[named["name"] for call, named in t.calls if call == "init"] for t in both]
    assert names[0] == ["runs-seed-7-1", "runs-seed-7-1", "runs-seed-7-3"]
    assert names[1] == ["runs-seed-7-2", "runs-seed-7-2", "runs-seed-7-4"]


def test_tensorboard_gets_a_file_in_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="pip install 'mlx-grpo[tensorboard]'")
    assert log_all(train_config(log=("tensorboard",)), tmp_path) == []
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"reward" in written and b"num_iterations" in written and b"a_word" not in written


def test_a_missing_library_is_one_line_before_the_run_starts(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.MODULES, "wandb", "a_module_that_is_not_there")
    config = train_config(**{**train_arguments, "log": ("wandb",)})
    with pytest.raises(InputError, match=r"pip install 'mlx-grpo\[wandb\]'"):
        train(config, Console(quiet=True))
    assert not config.run_directory.exists()


def test_a_directory_of_that_name_is_not_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_name_that_is_free").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(trackers.MODULES, "wandb", "a_name_that_is_free")
    with pytest.raises(InputError, match="is not installed"):
        trackers.check_installed(["wandb"])


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_sink_that_fails_is_told_of_once_and_training_goes_on(
    method: str,
    train_arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    tracker = Tracker("wandb")
    setattr(tracker, method, fails)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(trackers, "check_installed", lambda _: None)
    monkeypatch.setattr("mlx_grpo.training.loop.check_installed", lambda _: None)
    assert train(train_config(**{**train_arguments, "log": ("wandb",)}), Console(quiet=True))
    lines = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(lines) == 1 and "failed (no network at all); the run goes on without it" in lines[0]


def test_without_log_nothing_is_opened(tmp_path: Path) -> None:
    assert log_all(TrainConfig(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
