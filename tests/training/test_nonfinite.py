"""A value that is not finite never reaches weights, normaliser or controller, at any stage."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.finite import NotFinite, check_finite
from mlx_grpo.grpo import evaluate, reference, update
from mlx_grpo.grpo.learner import Learner, first_state
from mlx_grpo.models.lora import lora_parameters, set_parameters
from mlx_grpo.rewards.mix import RewardMix
from mlx_grpo.run import log
from mlx_grpo.run.checkpoint import step_directories
from mlx_grpo.training import loop as trainer
from mlx_grpo.training.setup import load_learner
from tests.helpers.tiny import write_model

QUIET = Console(quiet=True)
Patch = pytest.MonkeyPatch


def poison_reward(patch: Patch, value: float) -> None:
    real = RewardMix.__call__

    def poisoned(self: RewardMix, groups: Any, *rest: Any) -> Any:
        totals, parts = real(self, groups, *rest)
        totals[0][1] = value
        return totals, parts

    patch.setattr(RewardMix, "__call__", poisoned)


def poison_logprob(patch: Patch, value: float) -> None:
    real = reference.token_logps
    patch.setattr(reference, "token_logps", lambda *a, **k: real(*a, **k).at[0, 0].add(value))


def poison_loss(patch: Patch, value: float) -> None:
    real = update.clipped_surrogate
    patch.setattr(update, "clipped_surrogate", lambda *a: (mx.array(value), real(*a)[1]))


def poison_gradient(patch: Patch, value: float) -> None:
    real = update.gradients

    def poisoned(*arguments: Any) -> Any:
        gradients = real(*arguments)
        first = min(gradients)
        return {**gradients, first: gradients[first] + value}

    patch.setattr(update, "gradients", poisoned)


POISONS = {
    "reward": poison_reward,
    "logprob": poison_logprob,
    "loss": poison_loss,
    "gradient": poison_gradient,
}


def numbers(learner: Learner) -> dict[str, bytes]:
    """Bits of adapter and moments; step count and learning rate move only with them."""
    state = {n: v for n, v in tree_flatten(learner.optimizer.state) if v.ndim}
    return {
        n: bytes(memoryview(v))
        for n, v in {**lora_parameters(learner.roles.actor.model), **state}.items()
    }


@pytest.fixture
def learner(train_arguments: dict[str, Any]) -> Learner:
    return load_learner(train_config(**train_arguments), QUIET)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stage", POISONS)
def test_weights_normaliser_and_controller_stay_as_they_are(
    stage: str, value: float, learner: Learner, monkeypatch: Patch
) -> None:
    first = trainer.iterate(learner, first_state(learner.config), QUIET).state
    before = numbers(learner)
    with monkeypatch.context() as patch:
        POISONS[stage](patch, value)
        done = trainer.iterate(learner, first, QUIET)
    assert numbers(learner) == before
    assert {s.stage for s in done.skips} == {stage}
    assert (done.state.iteration, done.state.skipped_in_a_row) == (2, 1)
    if stage in ("reward", "logprob"):
        assert done.state.normalizer == first.normalizer
        assert done.state.controller == first.controller
        assert done.metrics["skipped"] == stage
    after = trainer.iterate(learner, done.state, QUIET)
    assert (after.skips, after.state.skipped_in_a_row) == ([], 0)


@pytest.mark.parametrize("stage", POISONS)
def test_the_batch_is_written_down_and_the_run_ends_after_some_in_a_row(
    stage: str,
    train_arguments: dict[str, Any],
    monkeypatch: Patch,
) -> None:
    config = train_config(**{**train_arguments, "max_skipped_steps": 2, "eval_every": 9})
    real, calls = trainer.iterate, []

    def poisoned_after_the_first(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            POISONS[stage](monkeypatch, math.nan)
        return real(*arguments)

    monkeypatch.setattr(trainer, "iterate", poisoned_after_the_first)
    with pytest.raises(InputError, match=r"in 2 iterations in a row .*skipped\.jsonl.*--learning"):
        trainer.train(config, QUIET)
    run = config.run_directory
    rows = log.read(run / log.SKIPPED)
    assert {row["step"] for row in rows} == {2, 3}
    assert {row["stage"] for row in rows} == {stage}
    assert "nan" in rows[0]["values"]
    assert len(rows[0]["groups"][0]["completions"]) == config.rollout.K
    assert rows[0]["groups"][0]["messages"][0]["content"].startswith("say ")
    for name in (log.METRICS, log.SKIPPED):  # plain JSON, which knows no NaN
        for line in (run / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda c: pytest.fail(c))
    monkeypatch.undo()
    assert trainer.train(config, QUIET, resume=True)


def test_an_adapter_that_gives_only_nan_does_not_cost_the_checkpoints_before_it(
    train_arguments: dict[str, Any], monkeypatch: Patch
) -> None:
    changes = {"max_skipped_steps": 3, "checkpoint_every": 1, "keep": 1, "num_iterations": 6}
    config = train_config(**{**train_arguments, **changes, "eval_every": 9})
    real, calls, told = trainer.iterate, [], []

    def poisoned_after_the_second(learner: Learner, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # finite weights, whose logits are not
            weights = lora_parameters(learner.roles.actor.model)
            set_parameters(learner.roles.actor.model, {n: v + 1e30 for n, v in weights.items()})
        return real(learner, *rest)

    monkeypatch.setattr(trainer, "iterate", poisoned_after_the_second)
    with pytest.raises(InputError, match="in 3 iterations in a row"):
        trainer.train(config, QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(Console, "warn", lambda ui, text: told.append(text))
    assert trainer.train(config, QUIET, resume=True)
    assert "step 5 comes after 3 iterations of NaN or infinity; going back to step 2" in told[0]
    assert not (config.run_directory / log.SKIPPED).exists()
    steps = [row["step"] for row in log.read(config.run_directory / log.METRICS) if "kl" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(step_directories(config.run_directory / "checkpoints")) == config.run.keep


def test_the_end_of_a_run_tells_of_a_last_figure_that_was_not_finite(
    train_arguments: dict[str, Any], monkeypatch: Patch
) -> None:
    config = train_config(**{**train_arguments, "eval_every": 1, "num_iterations": 2})
    real, calls, told = evaluate.perplexity, [], []

    def broken_at_the_last(*arguments: Any) -> float:
        calls.append(1)
        return math.nan if len(calls) == 3 else real(*arguments)

    monkeypatch.setattr(evaluate, "perplexity", broken_at_the_last)
    monkeypatch.setattr(Console, "say", lambda ui, text: told.append(text))
    assert trainer.train(config, QUIET)
    (lost,) = [text for text in told if "against best/" in text]
    assert "-> not finite" in lost


def test_a_reward_that_is_never_finite_is_refused_before_anything_is_written(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions):\n    return [float('nan')] * len(completions)\n")
    config = train_config(**{**train_arguments, "reward": (f"{file}:mine",)})
    with pytest.raises(InputError, match=r"reward 'mine' returned \[nan\] on prompt"):
        trainer.train(config, QUIET)
    assert not config.run_directory.exists()


def test_a_model_that_gives_nan_is_refused_before_anything_is_written(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text("def length(completions): return list(map(len, completions))")
    own = {"rm_model": "none", "reward": (f"{tmp_path / 'r.py'}:length",)}
    sft = write_model(tmp_path / "sft", rms_norm_eps=math.nan)
    config = train_config(**{**train_arguments, **own, "actor_model": str(sft)})
    with pytest.raises(InputError, match=r"sft: its log-probs are not finite; check the model's"):
        trainer.train(config, QUIET)
    assert not config.run_directory.exists()


def test_the_groups_and_their_values_are_named() -> None:
    check_finite("reward", {0: [0.0, 1e300], 1: [-0.0]})
    with pytest.raises(NotFinite) as found:
        rows = [[0.0, 1.0], [math.inf, 2.0], [3.0, 4.0], [5.0, math.nan]]
        check_finite("reward", dict(enumerate(rows)))
    assert found.value.skip.positions == (1, 3)
    assert str(found.value.skip.values) == "(inf, 2.0, 5.0, nan)"
