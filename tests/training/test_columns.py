"""A run on files with names of their own: trained, evaluated and exported by these names."""

from pathlib import Path

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.export.export import Export, export_run
from mlx_grpo.training.loop import train
from tests.helpers.tiny import write_jsonl

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(
    finished_run: Path, prompt_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Trained on a CSV file whose prompts are called `question`."""
    root = tmp_path_factory.mktemp("columns")
    (root / "train.csv").write_text("question,answer\n" + "".join(f"say {w},{w}\n" for w in "abcd"))
    (root / "eval.csv").write_text("question,answer\nwhy a?,a is.\nwhy b?,b is.\n")
    config = train_config(
        actor_model=str(finished_run.parent / "sft-4bit"),
        rm_model="none",
        reward=(f"{finished_run.parent / 'rewards.py'}:short",),
        prompts=str(root / "train.csv"),
        eval_prompts=str(root / "eval.csv"),
        prompt_column="question",
        response_column="answer",
        output=str(root / "run"),
        num_iterations=1,
        batch_size=2,
        minibatch_size=2,
        K=2,
        max_completion_length=4,
        lora_rank=2,
    )
    assert train(config, QUIET)
    return root / "run"


def test_an_evaluation_reads_the_run_s_own_prompts_by_their_names(run: Path) -> None:
    before = compare_run(run, None, "", QUIET).before
    assert [g.prompt.messages[0]["content"] for g in before.groups] == ["why a?", "why b?"]
    assert [g.prompt.response for g in before.groups] == ["a is.", "b is."]


def test_other_prompts_are_read_by_names_of_their_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "why c?"}])
    other = write_jsonl(tmp_path / "b.jsonl", [{"q": "why c?", "r": "c is."}])
    for file, columns in ((usual, ("", "")), (other, ("q", "r"))):
        before = compare_run(run, file, "", QUIET, columns=columns).before
        assert before.groups[0].prompt.messages[0]["content"] == "why c?"
        assert "cannot check" not in capsys.readouterr().err
    with pytest.raises(InputError, match="field 'prompt' is missing"):
        compare_run(run, other, "", QUIET)


def test_held_out_prompts_that_are_trained_on_are_found_under_any_names(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "b.jsonl", [{"q": "say a"}, {"q": "why c?"}])
    compare_run(run, file, "", QUIET, columns=("q", ""))
    told = capsys.readouterr().err
    assert "1 of 2 held-out prompts are also trained on (" in told and "train.csv:2)" in told


def test_an_export_measures_on_the_run_s_own_prompts(run: Path, tmp_path: Path) -> None:
    done = export_run(Export(run, "dequantized", output=tmp_path / "out"))
    assert done.cost and done.cost.texts == 2
