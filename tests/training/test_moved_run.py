"""A run whose directory goes away writes nothing in its place, and goes on once it is back."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import TrainConfig, train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.run import checkpoint, log
from mlx_grpo.training import loop
from mlx_grpo.training.loop import train

QUIET = Console(quiet=True)


def moved(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def deleted(run: Path) -> None:
    shutil.rmtree(run)


def replaced(run: Path) -> None:
    """By another run that has begun there."""
    moved(run)
    run.mkdir()
    (run / ".lock").write_text("1\n")
    (run / "config.toml").write_text("seed = 3\n")


def contents(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.rglob("*") if p.is_file()} if run.exists() else {}


@pytest.fixture
def config(train_arguments: dict[str, Any]) -> TrainConfig:
    return train_config(**{**train_arguments, "checkpoint_every": 2, "eval_every": 4})


def call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, act: Callable[[], None]
) -> None:
    """Run `act` once the call number `at` of a function has done its work."""
    real, calls = getattr(owner, name), []

    def watched(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        result = real(*arguments, **named)
        if len(calls) == at:
            act()
        return result

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("change", [moved, deleted, replaced])
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        *((loop, "iterate", 1), (loop, "iterate", 3), (loop, "iterate", 4)),
        *((Evaluator, "__call__", 1), (Evaluator, "__call__", 2)),
    ],
)
def test_nothing_is_written_where_the_run_was(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    owner: Any,
    name: str,
    at: int,
) -> None:
    run, after = config.run_directory, {}

    def act() -> None:
        change(run)
        after.update(contents(run))

    call(monkeypatch, owner, name, at, act)
    with pytest.raises(InputError, match=r"run: moved, deleted or replaced while the run went on"):
        train(config, QUIET)
    assert contents(run) == after
    assert run.exists() == (change is replaced)
    assert "resume with" not in capsys.readouterr().err  # there is nothing to resume


def test_it_goes_on_once_it_is_back(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.run_directory
    with monkeypatch.context() as once:
        call(once, loop, "iterate", 3, lambda: moved(run))
        with pytest.raises(InputError, match="resume from its last checkpoint: mlx-grpo train"):
            train(config, QUIET)
    run.with_name("elsewhere").rename(run)
    assert train(config, QUIET, resume=True)
    steps = [row["step"] for row in log.read(run / log.METRICS) if "reward" in row]
    assert steps == [1, 2, 3, 4]


def test_a_checkpoint_is_not_written_beside_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, log, "flush", 1, lambda: deleted(config.run_directory))
    with pytest.raises((InputError, OSError)):
        train(config, QUIET)
    assert not config.run_directory.exists()


def test_the_last_adapter_is_not_written_beside_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, checkpoint, "save", 2, lambda: deleted(config.run_directory))
    with pytest.raises(InputError, match="moved, deleted or replaced"):
        train(config, QUIET)
    assert not config.run_directory.exists()
