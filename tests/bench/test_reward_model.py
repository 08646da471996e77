"""The benchmark of reward models records what was measured, and measures again what was trained."""

import json
from pathlib import Path

import pytest

from bench.learning.reward_model import measure, train_and_record
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.reward_modeling.train import train_rm
from tests.helpers.tiny import write_jsonl

ROWS = [{"prompt": f"say {i}", "chosen": f"yes {i % 3}", "rejected": "no"} for i in range(12)]


@pytest.fixture
def settings(sft: Path) -> RewardTrainConfig:
    return RewardTrainConfig(model=str(sft), lora_rank=2, epochs=1, test_fraction=0.25)


def test_it_records_figures_curve_and_what_was_left_out(
    settings: RewardTrainConfig, tmp_path: Path
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [*ROWS, {**ROWS[0], "rejected": " "}])
    out = tmp_path / "results" / "figures.json"
    train_and_record(settings, pairs, out, Console(quiet=True))
    record = json.loads(out.read_text())
    assert (record["rows"], record["rows_with_an_empty_answer"]) == (13, 1)
    assert record["held_out"]["pairs"] == 3
    assert record["learning_curve"][-1]["pairs"] == 8
    assert str(tmp_path) not in out.read_text()


def test_a_trained_model_is_measured_on_the_prompts_it_never_saw(
    settings: RewardTrainConfig, sft: Path, tmp_path: Path
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    config = RewardTrainConfig(
        **{**vars(settings), "pairs": str(pairs), "output": str(tmp_path / "rm")}
    )
    trained = train_rm(config)
    again = measure(tmp_path / "rm", sft, Console(quiet=True))
    assert again.pairs == trained.pairs == 3
    assert again.loss == pytest.approx(trained.loss, rel=0.02)  # the adapter is written in bf16
