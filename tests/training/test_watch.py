"""What will slow a run down or end it is told once; a Mac stays awake; the end is announced."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_grpo.backend import device
from mlx_grpo.cli import main
from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import to_toml
from mlx_grpo.console.output import Console
from mlx_grpo.training import watch
from mlx_grpo.training.loop import train
from mlx_grpo.training.watch import look_around
from tests.helpers.programs import stand_in
from tests.helpers.terminal import mlx_grpo

GB = 10**9


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_swapping_is_told_once_with_what_to_type(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ui = Console()
    monkeypatch.setattr(watch, "swapped_bytes", lambda: 3 * GB)
    look_around(run, ui, 3 * GB - (200 << 20), 9e9, 0)
    assert told(capsys) == []
    for _ in range(3):
        look_around(run, ui, GB, 9e9, 0)
    (line,) = told(capsys)
    assert line.startswith("warning: the machine swaps: 2.0 GB more than when the run began")
    assert line.endswith(f": mlx-grpo train --resume --output {run} --memory-limit 7.0GB")


def test_heat_and_a_disk_that_fills_up_are_told_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ui, usage = Console(), SimpleNamespace(free=150_000_000)
    monkeypatch.setattr(watch, "speed_limit", lambda: 63)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for _ in range(2):
        look_around(run, ui, 0, 1e9, 100_000_000)
    hot, full = told(capsys)
    assert "runs at 63% of its speed" in hot
    assert "150 MB free on its disk, and a checkpoint needs 100 MB" in full


def test_a_machine_with_room_is_told_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look_around(run, Console(), 0, 1e9, 1000)
    assert told(capsys) == []


@pytest.mark.parametrize(("setting", "says"), [("auto", 1), ("off", 0)])
def test_a_run_says_that_it_keeps_the_mac_awake(
    setting: str,
    says: int,
    train_arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(tmp_path, monkeypatch, "caffeinate", "exec sleep 60")
    monkeypatch.setattr(device, "on_macos", lambda: True)
    short = {**train_arguments, "num_iterations": 1, "rm_model": "none", "reward": ()}
    short["reward"] = ("mlx_grpo.rubric:gold",)
    assert train(train_config(**short, keep_awake=setting), Console())
    assert capsys.readouterr().out.count("this Mac stays awake") == says


@pytest.mark.parametrize("program", ["osascript", "notify-send"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_the_runs_is_announced(
    program: str,
    fails: bool,
    train_arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(tmp_path, monkeypatch, program, f'for w in "$@"; do echo "$w"; done > {tmp_path}/told')
    config = tmp_path / "config.toml"
    config.write_text(to_toml(train_config(**{**train_arguments, "num_iterations": 1})))
    more = ["--prompts", str(tmp_path / "none.jsonl")] if fails else []
    monkeypatch.setattr(
        sys, "argv", ["mlx-grpo", "train", "--config", str(config), "--notify", "--quiet", *more]
    )
    assert main() == (2 if fails else 0)
    words = (tmp_path / "told").read_text().splitlines()
    text = words[-2] if program == "osascript" else words[-1]
    assert text.startswith("failed: ") if fails else text == "finished"


def test_without_a_desktop_the_terminal_rings(
    train_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "notify-send", "exit 1")
    config = tmp_path / "config.toml"
    config.write_text(to_toml(train_config(**{**train_arguments, "num_iterations": 1})))
    terminal = mlx_grpo("train", "--config", str(config), "--notify")
    assert terminal.end() == 0
    assert terminal.raw.count(b"\x07") == 1
