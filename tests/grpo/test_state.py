"""The rule of the best checkpoint: the KL gate first, then the metric that chooses."""

import math
from dataclasses import replace

import pytest

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.grpo.learner import first_state
from mlx_grpo.grpo.state import Best, improves


@pytest.mark.parametrize(
    ("kl", "perplexity", "passes"),
    [
        (0.01, 7.9, True),
        (0.02, 7.9, False),  # on the target is not below it
        (0.03, 1.0, False),
        (0.01, 8.0, False),  # as good as the best is not better
        (0.01, 8.1, False),
        (math.nan, 1.0, False),
        (0.01, math.nan, False),
    ],
)
def test_the_gate_wants_kl_below_target_and_a_better_perplexity(
    kl: float, perplexity: float, passes: bool
) -> None:
    assert (not Best(50, 8.0).refusal(kl, perplexity, gate=0.02)) == passes


def test_the_first_to_pass_the_gate_is_best_whatever_its_perplexity() -> None:
    assert Best().step is None
    assert Best().refusal(0.01, 1e9, gate=0.02) == ""
    assert Best().refusal(0.5, 1.0, gate=0.02) == "KL above its gate of 0.02"


def test_the_gate_is_named_before_the_perplexity() -> None:
    assert Best(50, 8.0).refusal(0.03, 9.0, gate=0.02).startswith("KL above")
    assert Best(50, 8.0).refusal(0.01, 9.0, gate=0.02) == "perplexity not better"


@pytest.mark.parametrize(
    ("metric", "value", "better"),
    [
        ("eval_reward", 2.0, True),
        ("eval_reward", 0.5, False),
        ("eval_rewards/right/pass@4", 2.0, True),
        ("eval_perplexity", 0.5, True),
        ("eval_perplexity", 2.0, False),
        ("eval_kl", 0.5, True),
        ("eval_reward", math.inf, False),
        ("eval_reward", 1.0, False),
    ],
)
def test_rewards_are_better_when_higher_and_all_else_when_lower(
    metric: str, value: float, better: bool
) -> None:
    assert improves(metric, value, 1.0) == better
    assert not improves(metric, math.nan, None)


def test_a_reward_that_chooses_stays_behind_the_kl_gate() -> None:
    best = Best(50, 8.0)
    assert best.refusal(0.03, 9.0, 0.02, "eval_reward").startswith("KL above")
    assert best.refusal(0.01, 9.0, 0.02, "eval_reward") == ""
    assert best.refusal(0.01, 7.0, 0.02, "eval_reward") == "reward not better"


def test_evaluations_without_a_gain_are_counted_from_the_peak_and_not_from_the_sft_model() -> None:
    state, counts = first_state(TrainConfig()), []
    for step, reward in enumerate([9.0, 1.0, 3.0, 2.0, 3.0, 4.0]):
        state = replace(state, iteration=step)
        state = state.after_evaluation("eval_reward", reward, state.best)
        counts.append(state.without_gain)
    assert counts == [0, 0, 0, 1, 2, 0]
    assert first_state(TrainConfig()).with_json(state.to_json()) == state


def test_a_state_of_an_older_version_keeps_its_best_perplexity() -> None:
    saved = first_state(TrainConfig()).to_json()
    saved = {n: v for n, v in saved.items() if n not in ("peak", "without_gain")}
    old = {**saved, "best": {"step": 50, "perplexity": 8.0}}
    assert first_state(TrainConfig()).with_json(old).best == Best(50, 8.0)
