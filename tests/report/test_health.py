"""A run's figures give reason to warn, and only where they do."""

from typing import Any

import pytest

from mlx_grpo.report.final import lost_since_best
from mlx_grpo.report.health import findings, new_findings

HEALTHY = {
    "reward": 1.0,
    "kl": 0.02,
    "kl/target": 0.02,
    "frac_dead_groups": 0.1,
    "clip_ratio/region_mean": 0.01,
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.2,
    "policy/skipped_nonfinite": 0,
    "sampling/sampling_logp_difference/mean": 0.003,
}
EVALUATION = {
    "eval_reward": 0.0,
    "eval_kl": 0.01,
    "eval_perplexity": 20.0,
    "eval_best": False,
    "eval_rewards/gold/mean": 0.6,
}


def iterations(**ends: tuple[float, float]) -> list[dict[str, Any]]:
    """Twenty rows; the named figures jump half way from the first value to the second."""
    named = {k.replace("__", "/"): v for k, v in ends.items()}
    return [
        {"step": i + 1, **HEALTHY, **{k: v[i >= 10] for k, v in named.items()}} for i in range(20)
    ]


def evaluations(**last: float) -> list[dict[str, Any]]:
    """One before the training, and one after it that is the best."""
    later = {
        "eval_reward": 1.0,
        "eval_best": True,
        **{k.replace("__", "/"): v for k, v in last.items()},
    }
    return [{"step": 0, **EVALUATION}, {"step": 20, **EVALUATION, **later}]


def titles(rows: list[dict[str, Any]]) -> list[str]:
    return [f.title for f in findings(rows, ["gold"])]


def test_a_healthy_run_gets_no_warning() -> None:
    assert titles([*iterations(), *evaluations(eval_rewards__gold__mean=0.7)]) == []


@pytest.mark.parametrize(
    ("figure", "first", "last", "title"),
    [
        ("completions__mean_length", 40.0, 61.0, "Answers grow"),
        ("completions__mean_length", 40.0, 26.0, "Answers shrink"),
        ("completions__repetition", 0.05, 0.3, "Answers repeat themselves"),
        ("frac_dead_groups", 0.1, 0.6, "Most groups teach nothing"),
        ("clip_ratio__region_mean", 0.0, 0.4, "The clip silences many tokens"),
        (
            "sampling__sampling_logp_difference__mean",
            *(0.001, 0.2, "What is scored is not what was sampled"),
        ),
        ("completions__clipped_ratio", 0.2, 0.9, "Most answers are cut off"),
        ("kl", 0.02, 0.04, "The KL is above its target"),
        ("kl", 0.02, 0.009, "The KL is far below its target"),
        ("policy__skipped_nonfinite", 0, 1, "NaN or infinity was met"),
    ],
)
def test_each_figure_out_of_its_range_is_named_with_what_to_try(
    figure: str, first: float, last: float, title: str
) -> None:
    rows = iterations(**{figure: (first, last)})
    assert titles(rows) == [title]
    found = findings(rows)[0]
    assert found.evidence and found.advice.endswith(".")
    assert titles(iterations(**{figure: (first, first)})) == []


@pytest.mark.parametrize(
    ("figure", "value", "title"),
    [
        ("eval_rewards__gold__mean", 0.5, "The reward rises while the gold judge falls"),
        ("eval_perplexity", 22.0, "The reward rises while the perplexity worsens"),
    ],
)
def test_a_reward_that_rises_alone_is_called_out(figure: str, value: float, title: str) -> None:
    rows = evaluations(**{figure: value})
    assert titles(rows) == [title]
    assert titles([rows[0], {**rows[1], "eval_reward": -0.5}]) == []  # nothing was gained by it


def test_a_custom_judge_that_nobody_calls_gold_is_not_one() -> None:
    assert findings(evaluations(eval_rewards__gold__mean=0.1), gold=[]) == []


def test_a_second_judge_that_falls_later_is_news() -> None:
    def rows(gold: float, form: float, step: int) -> dict[str, Any]:
        judges = {"eval_rewards/gold/mean": gold, "eval_rewards/form/mean": form}
        return {**EVALUATION, **judges, "step": step, "eval_reward": step / 10, "eval_best": True}

    told = [rows(0.6, 0.6, 0), rows(0.5, 0.6, 10), rows(0.5, 0.4, 20)]
    (news,) = new_findings(told, ["gold", "form"])
    assert "form 0.600 -> 0.400" in news.evidence


def judged(golds: list[float], rewards: list[float]) -> list[dict[str, Any]]:
    """Evaluations with these means."""
    return [
        {**EVALUATION, "step": 10 * i, "eval_reward": reward, "eval_rewards/gold/mean": gold}
        | {"eval_best": True}
        for i, (gold, reward) in enumerate(zip(golds, rewards, strict=True))
    ]


def test_a_reward_that_rises_on_past_the_peak_of_the_judge_is_over_optimised() -> None:
    golds = [0.5, 0.6, 0.7, 0.8, 0.7, 0.6, 0.6]
    rising = [0.1 * i for i in range(7)]
    (found,) = findings(judged(golds, rising), ["gold"])
    assert found.title == "The reward is over-optimised"
    assert "since about iteration 30 held-out reward +0.30 -> +0.50, gold 0.733 -> 0.633" in (
        found.evidence
    )
    assert findings(judged(golds, rising[::-1]), ["gold"]) == []  # the reward falls as well
    assert findings(judged([0.5, 0.6, 0.7, 0.6, 0.7, 0.7, 0.7], rising), ["gold"]) == []  # noise
    (fell,) = findings(judged([0.5, 0.6, 0.7, 0.8, 0.6, 0.5, 0.4], rising), ["gold"])
    assert fell.title == "The reward rises while the gold judge falls"  # that, and not both


def test_what_final_has_lost_against_best_is_said() -> None:
    rows = judged([0.5, 0.7, 0.6], [0.0, 1.0, 2.0])
    rows[2] |= {"eval_best": False, "eval_kl": 0.03, "eval_perplexity": None}
    assert lost_since_best(rows, ["gold"]) == (
        "final/ (iteration 20) has lost against best/ (iteration 10): gold judge 0.700 -> 0.600, "
        "perplexity 20.00 -> not finite, KL 0.0100 -> 0.0300."
    )
    rows[2] |= {"eval_rewards/gold/mean": 0.8, "eval_kl": 0.01, "eval_perplexity": 20.0}
    assert lost_since_best(rows, ["gold"]).endswith(
        "has lost nothing against best/ (iteration 10) in reward, gold judge, perplexity, KL."
    )
    assert lost_since_best(rows[:2]) == lost_since_best([]) == ""


def test_noise_of_a_gold_judge_is_no_fall() -> None:
    assert titles(evaluations(eval_rewards__gold__mean=0.595)) == []


def test_a_run_without_a_best_checkpoint_says_so() -> None:
    rows = evaluations(eval_best=False)
    assert titles(rows) == ["No evaluation has passed the KL gate"]
    (found,) = findings([rows[0], {**rows[1], "eval_kl": None}])
    assert found.evidence == "every KL was NaN or infinite; there is no best/ adapter"


def test_skipped_iterations_are_counted() -> None:
    rows = [*iterations(), {"step": 21, "skipped": "reward"}]
    assert findings(rows)[0].evidence.startswith("1 iterations and 0 optimizer steps")


def test_too_few_iterations_say_nothing() -> None:
    assert titles(iterations(kl=(0.5, 0.5))[:4]) == []


def test_a_value_that_was_not_finite_is_left_out() -> None:
    rows = [*iterations(), {**iterations()[0], "kl": None, "frac_dead_groups": None}]
    assert titles(rows) == []


def test_what_the_evaluation_before_gave_reason_to_say_is_not_new() -> None:
    rows = [*evaluations(eval_perplexity=30.0), *evaluations(eval_perplexity=31.0)[1:]]
    assert [f.title for f in new_findings(rows[:2])] == [
        "The reward rises while the perplexity worsens"
    ]
    assert new_findings(rows) == []
