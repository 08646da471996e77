"""Files of a run that lack names, hold other things, or are of a newer version: one line each."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.cli import main
from mlx_grpo.files.manifest import MANIFEST, write_manifest
from mlx_grpo.run.fields import STATE
from tests.helpers.runs import write_run

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def change_state(run: Path, change: Change) -> Path:
    """Another content of the newest state.json, which its manifest knows."""
    step = sorted((run / "checkpoints").glob("step-*"))[-1]
    for older in sorted((run / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(older)
    state = json.loads((step / "state.json").read_text())
    changed = change(state)
    (step / "state.json").write_text(json.dumps(state if changed is None else changed))
    tensors = json.loads((step / MANIFEST).read_text())["tensors"]
    write_manifest(step, {"tensors": tensors})
    return step / "state.json"


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The one line that a command ends with."""
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", *arguments])
    capsys.readouterr()
    assert main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def without(name: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        del state[name]

    return change


def having(**values: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        state.update(values)

    return change


@pytest.mark.parametrize("name", sorted(STATE.keys() - {"inputs"}))
def test_a_missing_name_of_the_state_is_named(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    change_state(run, without(name))
    said = command(monkeypatch, capsys, "train", "--quiet", "--resume", "--output", str(run))
    assert f"state.json: field '{name}' is missing" in said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (having(iteration="2"), "field 'iteration' must be a whole number, not '2'"),
        (having(iteration=True), "field 'iteration' must be a whole number"),
        (having(beta=None), "field 'beta' must be a number"),
        (having(normalizer=[1, 2]), "field 'normalizer' must be a table"),
        (having(normalizer={"mean": 0.0}), "normalizer: field 'std' is missing"),
        (having(best={"step": "x", "perplexity": 1}), "best: field 'step' must be a number"),
        (having(logs={"metrics.jsonl": "long"}), "logs: field 'metrics.jsonl' must be a whole"),
        (having(config=None), "field 'config' must be a table"),
        (having(inputs=3), "field 'inputs' must be a table"),
        (having(versions=["mlx"]), "field 'versions' must be a table"),
        (lambda state: [state], "state.json: must hold a JSON object"),
        (having(versions={"mlx-grpo": "99.1"}), "made by mlx-grpo 99.1, which is newer than this"),
    ],
)
def test_a_state_of_another_kind_is_refused_with_its_field(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    complaint: str,
) -> None:
    change_state(run, change)
    assert complaint in command(
        monkeypatch, capsys, "train", "--quiet", "--resume", "--output", str(run)
    )


@pytest.mark.parametrize("words", [("train", "--resume", "--output"), ("report",), ("eval",)])
def test_a_setting_that_only_a_newer_version_knows_is_told_as_such(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Any
) -> None:
    change_state(run, having(versions={"mlx-grpo": "99.1"}))
    with (run / "config.toml").open("a") as file:
        file.write("from_the_future = 3\n")
    said = command(monkeypatch, capsys, *words, str(run))
    assert "newer than this one" in said and "type: pip install --upgrade mlx-grpo" in said


def rows_of(run: Path, change: Change) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[10])
    changed = change(row)
    lines[10] = json.dumps(row if changed is None else changed)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("step"), "metrics.jsonl:11: field 'step' is missing"),
        (without("kl/target"), "metrics.jsonl:11: field 'kl/target' is missing"),
        (without("time/iteration"), "metrics.jsonl:11: field 'time/iteration' is missing"),
        (having(step="ten"), "metrics.jsonl:11: field 'step' must be a whole number, not 'ten'"),
        (having(reward="good"), "field 'reward' must be a number"),
        (having(kl=[1]), "field 'kl' must be a number"),
        (having(eval_reward=1.0), "field 'eval_kl' is missing"),
        (lambda row: [1, 2], "metrics.jsonl:11: must be a JSON object, not list"),
        (lambda row: "text", "metrics.jsonl:11: must be a JSON object, not str"),
    ],
)
def test_a_row_of_the_figures_that_is_none_is_named_with_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    complaint: str,
) -> None:
    run = write_run(tmp_path / "run")
    rows_of(run, change)
    assert complaint in command(monkeypatch, capsys, "report", str(run))


@pytest.mark.parametrize("name", ["id", "step", "prompt", "completion", "reward"])
def test_a_held_out_answer_without_a_name_is_named_with_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "eval_completions.jsonl").read_text().splitlines()
    row = json.loads(lines[2])
    del row[name]
    lines[2] = json.dumps(row)
    (run / "eval_completions.jsonl").write_text("\n".join(lines) + "\n")
    said = command(monkeypatch, capsys, "report", str(run))
    assert f"eval_completions.jsonl:3: field '{name}' is missing" in said


@pytest.mark.parametrize("field", ["versions", "inputs"])
def test_a_page_wants_tables_where_a_checkpoint_tells_its_origin(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    field: str,
) -> None:
    run = write_run(tmp_path / "run")
    place = run / "checkpoints" / "step-000060" / "state.json"
    place.write_text(json.dumps({field: [1]}))
    assert f"field '{field}' must be a table" in command(monkeypatch, capsys, "report", str(run))
