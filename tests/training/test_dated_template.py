"""A chat template that reads the clock: a run keeps the date of its first day."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.config.settings import (
    RewardTrainConfig,
    TrainConfig,
    train_config,
    with_settings,
)
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import conversation_tokens
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.files.atomic import read_json
from mlx_grpo.grpo.learner import Learner
from mlx_grpo.models.reward_model import REWARD_CONFIG, REWARD_HEAD
from mlx_grpo.reward_modeling.train import train_rm
from mlx_grpo.run.directory import CONFIG, with_date
from mlx_grpo.training import loop
from mlx_grpo.training.loop import train
from mlx_grpo.training.setup import load_learner
from tests.helpers.tiny import CHAT_TEMPLATE, write_tokenizer

QUIET = Console(quiet=True)


@pytest.fixture
def dated(train_arguments: dict[str, Any], sft: Path, tmp_path: Path) -> TrainConfig:
    """A run of a model whose template writes the day and the month into each prompt."""
    model = shutil.copytree(sft, tmp_path / "dated")
    write_tokenizer(model, "{{ strftime_now('%d%b') }}" + CHAT_TEMPLATE)
    (tmp_path / "mine.py").write_text(
        "def short(completions): return [-len(c) for c in completions]"
    )
    own = {"actor_model": str(model), "rm_model": "none", "reward": (f"{tmp_path}/mine.py:short",)}
    return train_config(**{**train_arguments, **own})


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_grpo.run.directory.today", lambda: day)
    monkeypatch.setattr("mlx_grpo.reward_modeling.train.today", lambda: day)


def first_prompt(learner: Learner) -> str:
    return str(learner.roles.backbone.tokenizer.decode(list(learner.prompts[0].token_ids)))


def test_a_run_resumed_on_another_day_equals_the_uninterrupted_one(
    dated: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("2026-01-31", monkeypatch)
    whole = with_settings(dated, output=str(tmp_path / "whole"))
    assert train(whole, QUIET)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = loop.iterate

        def ends_in_iteration_four(learner: Learner, state: Any, *rest: Any) -> Any:
            if state.iteration == 3:
                raise KeyboardInterrupt
            return real(learner, state, *rest)

        patch.setattr(loop, "iterate", ends_in_iteration_four)
        train(dated, QUIET)
    on("2026-02-01", monkeypatch)
    assert train(dated, QUIET, resume=True)
    final = "final/adapters.safetensors"
    run = dated.run_directory
    assert (run / final).read_bytes() == (whole.run_directory / final).read_bytes()
    assert build_config(run / CONFIG).model.template_date == "2026-01-31"
    state = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["config"]["template_date"] == "2026-01-31"
    with pytest.raises(InputError, match="--template-date 2026-01-31 -> 2026-02-01"):
        train(with_settings(dated, template_date="2026-02-01"), QUIET, resume=True)


def test_prompts_hold_the_date_of_the_run(
    dated: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("2026-01-31", monkeypatch)
    learner = load_learner(with_date(dated, resume=False), QUIET)
    learner.evaluator.rewards.close()
    assert first_prompt(learner).startswith("31Jan<user>")


def test_an_evaluation_uses_the_date_of_the_run(
    dated: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(with_settings(dated, num_iterations=1, template_date="2020-05-06"), QUIET)
    compared = compare_run(dated.run_directory, None, "", QUIET)
    seen = compared.before.groups[0].prompt.token_ids
    learner = load_learner(with_settings(dated, template_date="2020-05-06"), QUIET)
    learner.evaluator.rewards.close()
    assert seen == learner.evaluator.prompts[0].token_ids
    assert first_prompt(learner).startswith("06May<user>")


def test_a_run_from_before_dates_were_kept_goes_on_without_one(
    dated: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dated.run_directory
    run.mkdir()
    (run / CONFIG).write_text("K = 3\n")
    assert with_date(dated, resume=True).model.template_date == ""
    on("2026-01-31", monkeypatch)
    assert with_date(dated, resume=False).model.template_date == "2026-01-31"


def test_a_reward_model_keeps_the_date_it_was_trained_with(
    dated: TrainConfig, pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("2026-01-31", monkeypatch)
    out = tmp_path / "rm"
    config = RewardTrainConfig(
        model=dated.model.actor, pairs=str(pair_file), output=str(out), epochs=1, lora_rank=2
    )
    train_rm(config)
    assert read_json(out / "reward_model.json")["training"]["template_date"] == "2026-01-31"


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_reward_model_with_a_template_of_its_own_sees_the_date_of_the_run(
    dated: TrainConfig, residency: str
) -> None:
    judge = Path(dated.model.actor)
    head = {"weight": mx.random.normal((1, 32), key=mx.random.key(0))}
    mx.save_safetensors(str(judge / REWARD_HEAD), head)
    (judge / REWARD_CONFIG).write_text('{"kind": "full", "input": "chat_template"}')
    own = {"rm_model": str(judge), "rm_residency": residency, "template_date": "2026-01-31"}
    learner = load_learner(with_settings(dated, **own), QUIET)
    learner.evaluator.rewards.close()
    model = learner.evaluator.rewards.model
    assert model and model.tokenizer
    shown = model.tokenizer.decode(list(conversation_tokens(model.tokenizer, [], "x")))
    assert shown.startswith("31Jan")


@pytest.mark.parametrize("date", ["tomorrow", "2026-02-30", "31.01.2026"])
def test_a_date_that_is_none_is_refused(dated: TrainConfig, date: str) -> None:
    with pytest.raises(InputError, match=r"--template-date: must be a date such as"):
        train(with_settings(dated, template_date=date), QUIET)
