"""Held-out prompts that are trained on, and files of one prompt, are said before a run starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.data.leaks import leak_warnings
from mlx_grpo.data.prompts import PromptRow
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.training.setup import load_learner
from tests.helpers.tiny import write_jsonl

QUIET = Console(quiet=True)


def rows(file: str, *texts: str, system: str = "") -> list[PromptRow]:
    before = ({"role": "system", "content": system},) if system else ()
    return [
        PromptRow(f"{file}:{i}", str(i), (*before, {"role": "user", "content": t}), None, {})
        for i, t in enumerate(texts, 1)
    ]


def found(train: list[PromptRow], held_out: list[PromptRow]) -> list[str]:
    return list(leak_warnings("t.jsonl", train, "h.jsonl", held_out))


@pytest.mark.parametrize(
    ("held_out", "but_for"),
    [
        ("Why is tea hot?", ""),
        ("why is TEA hot?", ", 1 of them but for case and spaces"),
        ("  Why is\n\ttea  hot? ", ", 1 of them but for case and spaces"),
        ("Why is tea hot\uff1f", ", 1 of them but for case and spaces"),
    ],
)
def test_a_held_out_prompt_that_is_trained_on_is_counted_and_placed(
    held_out: str, but_for: str
) -> None:
    train = rows("t.jsonl", "Say rain.", "Why is tea hot?")
    (line,) = found(train, rows("h.jsonl", "Say figs.", held_out))
    assert line.startswith(
        f"h.jsonl: 1 of 2 held-out prompts are also trained on{but_for} (h.jsonl:2 is t.jsonl:2)"
    )
    assert "remove them from one of the two files" in line


def test_another_question_and_another_system_message_are_no_leak() -> None:
    train = rows("t.jsonl", "Say tea.", "Say rain.")
    assert found(train, rows("h.jsonl", "Say tea!", "Say figs.")) == []
    assert found(train, rows("h.jsonl", "Say tea.", system="in French")) == []
    (asked,) = rows("h.jsonl", "Say tea.")
    by_tool = replace(asked, messages=({**asked.messages[0], "name": "tool"},))
    assert found(train, [by_tool]) == []


def test_a_file_of_one_prompt_or_of_few_is_said_for_either_side() -> None:
    same, two = ["Say tea."] * 8, ["Say rain.", "Say figs."] * 4
    lines = found(rows("t.jsonl", *same), rows("h.jsonl", *two))
    assert lines[0].startswith("t.jsonl: its 8 prompts are all the same; ")
    assert lines[1].startswith("h.jsonl: its 8 prompts are only 2 different ones; ")
    assert found(rows("t.jsonl", "Say tea."), rows("h.jsonl", "a", "a")) == []


def test_train_and_eval_both_say_so_before_they_start(
    train_arguments: dict[str, Any],
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leaked = [{"prompt": "say tea"}, {"prompt": "SAY  rain"}, {"prompt": "why owls?"}]
    file = write_jsonl(tmp_path / "held_out.jsonl", leaked)
    load_learner(train_config(**{**train_arguments, "eval_prompts": str(file)}), QUIET)
    told = capsys.readouterr().err
    compare_run(finished_run, file, "", QUIET)
    for said in (told, capsys.readouterr().err):
        (line,) = [line for line in said.splitlines() if "also trained on" in line]
        assert line.startswith(
            f"warning: {file}: 2 of 3 held-out prompts are also trained on, 1 of"
        )


def test_an_evaluation_whose_training_prompts_are_gone_says_that_it_cannot_check(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    text = (run / "config.toml").read_text()
    was = next(line for line in text.splitlines() if line.startswith("prompts = "))
    (run / "config.toml").write_text(text.replace(was, f"prompts = {json.dumps('gone.jsonl')}"))
    compare_run(run, None, "", QUIET)
    assert "cannot check whether held-out prompts were trained on: gone.jsonl: no such file" in (
        capsys.readouterr().err
    )


def limited(finished_run: Path, place: Path, limit: int) -> Path:
    """A copy of a run whose first held-out prompts alone chose best/."""
    run = Path(shutil.copytree(finished_run, place))
    text = (run / "config.toml").read_text()
    assert text.count("\nlimit = 0\n") == 1
    (run / "config.toml").write_text(text.replace("\nlimit = 0\n", f"\nlimit = {limit}\n"))
    return run


def test_a_run_is_judged_on_held_out_prompts_that_did_not_choose_best(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = limited(finished_run, tmp_path / "run", 1)
    compared = compare_run(run, None, "best", QUIET)
    assert [g.prompt.id for g in compared.after.groups] == ["rain", "bees"]
    assert len(compare_run(run, None, "", QUIET, limit=1).after.groups) == 1
    assert "chose best/" not in capsys.readouterr().err


def test_prompts_that_also_chose_best_are_counted_where_it_is_judged(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_run(finished_run, None, "best", QUIET)
    said = capsys.readouterr().err
    assert "3 of its 3 prompts choose best/ as well" in said and "use others to judge it" in said
    compare_run(finished_run, None, "final", QUIET)
    assert "chose best/" not in capsys.readouterr().err
    run = limited(finished_run, tmp_path / "run", 1)
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Why TEA?"}, {"prompt": "Why rain?"}])
    compare_run(run, other, "best", QUIET)
    assert f"{other}: 1 of its 2 prompts choose best/ as well" in capsys.readouterr().err


def test_rows_of_an_environment_differ_by_their_fields() -> None:
    def row(secret: int) -> PromptRow:
        return replace(rows("t.jsonl", "find it")[0], fields={"secret": secret})

    train, held_out = [row(1), row(2)], [row(3), row(2)]
    (said,) = leak_warnings("t.jsonl", train, "h.jsonl", held_out, fields=True)
    assert "1 of 2 held-out prompts are also trained on" in said
    assert "2 of 2 held-out" in " ".join(leak_warnings("t.jsonl", train, "h.jsonl", held_out))
