"""The list of runs says how each stands and what to type next."""

import sys
from pathlib import Path

import pytest

from mlx_grpo.cli import main
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.lock import locked
from mlx_grpo.report.listing import listed, runs_in
from tests.helpers.runs import write_run
from tests.helpers.terminal import mlx_grpo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "seed-1", seed=1)
    write_run(tmp_path / "runs" / "seed-2", seed=2, steps=30)
    return tmp_path / "runs"


def test_a_finished_a_stopped_and_a_running_run_are_told_apart(folder: Path) -> None:
    at_work = write_run(folder / "seed-3", seed=3, steps=20)
    with locked(at_work):
        finished, stopped, running = listed(folder)
    assert finished.cells[:5] == ("finished", "60/60", "+3.100", "0.0150", "30")
    assert finished.cells[-1] == "26 min"  # 60 iterations of 22 s and seven evaluations of 30 s
    assert finished.next == f"mlx-grpo chat {folder / 'seed-1'}"
    assert stopped.cells[:2] == ("stopped", "30/60")
    assert stopped.next == f"mlx-grpo train --resume --output {folder / 'seed-2'}"
    assert running.cells[:2] == ("running", "20/60")
    assert running.next == f"mlx-grpo samples {at_work}"


def test_a_run_before_its_first_evaluation_is_no_damage(folder: Path) -> None:
    begun = write_run(folder / "seed-3", seed=3)
    (begun / "metrics.jsonl").unlink()
    with locked(begun):
        running = listed(folder)[2]
    stopped = listed(folder)[2]
    assert running.cells == ("running", "0/60", "", "", "", "0 s")
    assert (running.next, running.damage) == ("", "")
    assert stopped.cells[:2] == ("stopped", "0/60")
    assert stopped.next == f"mlx-grpo train --resume --output {begun}"


def test_runs_inside_folders_are_found_and_hidden_ones_are_not(folder: Path) -> None:
    write_run(folder / "seeds" / "seed-7")
    write_run(folder / ".trash" / "seed-8")
    names = ["seed-1", "seed-2", "seeds/seed-7"]
    assert runs_in(folder) == [folder / name for name in names]
    assert runs_in(folder / "seed-1") == [folder / "seed-1"]


def test_a_damaged_run_hides_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "seed-1" / "metrics.jsonl").write_text("{\n")
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "runs", str(folder)])
    assert main() == 0
    out, err = capsys.readouterr()
    assert "damaged" in out and "stopped" in out
    assert err.startswith(f"warning: {folder / 'seed-1' / 'metrics.jsonl'}:1: not valid JSON")


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_runs_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{name}: no (runs in it|such directory)"):
        listed(tmp_path / name)


def test_eighty_columns_hold_the_list_with_no_word_broken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    terminal = mlx_grpo("runs", "runs")
    assert terminal.end() == 0
    seen = terminal.seen()
    assert [w for w in ("finished", "stopped", "60/60", "30/60", "+3.200") if w not in seen] == []
    assert "runs/seed-2: mlx-grpo train --resume --output runs/seed-2" in seen
    assert seen.count("┃") == 8  # a table, not a list
