"""What a comparison lists: every judge of the answers, once, with its ties."""

import math
from dataclasses import replace

import pytest

from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.evaluation.compare import Comparison, contests, strata
from mlx_grpo.evaluation.judge import Verdicts
from mlx_grpo.evaluation.table import comparison_json, show_comparison
from mlx_grpo.grpo.evaluate import Evaluation


def evaluation(rewards: list[float], **by_source: list[float]) -> Evaluation:
    """One whose answers do not matter."""
    return Evaluation(
        reward=sum(rewards) / len(rewards),
        kl=0.0,
        perplexity=1.0,
        mean_length=1.0,
        finished=1.0,
        rewards=tuple(rewards),
        groups=(),
        by_source=by_source,
    )


def listed(before: Evaluation, after: Evaluation) -> dict[str, list[list[float]]]:
    comparison = Comparison(before, after, "best", "prompts.jsonl")
    return {name: [list(s) for s in sides] for name, sides in contests(comparison).items()}


def test_a_reward_that_is_the_only_one_is_listed_once() -> None:
    before, after = evaluation([1.0, 2.0], model=[1, 2]), evaluation([3.0, 4.0], model=[3, 4])
    assert listed(before, after) == {"reward": [[1.0, 2.0], [3.0, 4.0]]}


@pytest.mark.parametrize("measured", [[5.0, 6.0], [0.0, 0.0]])
def test_a_judge_that_is_only_measured_is_listed_beside_the_reward(measured: list[float]) -> None:
    before = evaluation([1.0, 2.0], model=[1.0, 2.0], gold=[7.0, 7.0])
    after = evaluation([3.0, 4.0], model=[3.0, 4.0], gold=measured)
    assert listed(before, after) == {
        "reward": [[1.0, 2.0], [3.0, 4.0]],
        "gold": [[7.0, 7.0], measured],
    }


def test_rewards_that_are_added_up_are_listed_one_by_one() -> None:
    before = evaluation([3.0, 5.0], model=[1.0, 2.0], short=[2.0, 3.0])
    after = evaluation([7.0, 9.0], model=[3.0, 4.0], short=[4.0, 5.0])
    assert list(listed(before, after)) == ["reward", "model", "short"]


def test_a_judge_that_agreed_before_training_and_not_after_is_listed() -> None:
    before = evaluation([1.0, 2.0], model=[1.0, 2.0], form=[0.0, 0.0])
    after = evaluation([3.0, 4.0], model=[0.5, 1.0], form=[2.5, 3.0])
    assert list(listed(before, after)) == ["reward", "model", "form"]


def test_ties_stand_beside_every_win_rate(capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluation([1.0, 2.0, 3.0], model=[1.0, 2.0, 3.0], gold=[1.0, 1.0, 0.0])
    after = evaluation([1.0, 2.5, 3.0], model=[1.0, 2.5, 3.0], gold=[0.0, 0.0, 1.0])
    show_comparison(Console(), Comparison(before, after, "best", "p.jsonl", ("gold",)))
    out = capsys.readouterr().out
    assert "reward (2 ties)" in out and "67%" in out  # one won, two tied
    assert "gold judge " in out and "gold judge (" not in out


def asked(categories: list[str | None]) -> tuple[Group, ...]:
    """Prompts with such a field, or none, and an answer each."""
    return tuple(
        Group(
            Prompt(f"p{i}", ({"content": "?"},), (1,), None, {"category": c} if c else {}),
            (Completion((2,), "so", "stop", (0.0,)),),
        )
        for i, c in enumerate(categories)
    )


def test_wins_are_told_apart_by_a_field_of_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    groups = asked(["fact", "poem", "fact"])
    before, after = (
        replace(evaluation(r, model=r, gold=g), groups=groups)
        for r, g in (([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), ([2.0, 1.0, 4.0], [1.0, 1.0, 0.0]))
    )
    comparison = Comparison(before, after, "best", "p.jsonl", by="category")
    verdicts = Verdicts((1.0, 0.5, 0.0), 1, 0)
    found = comparison_json(comparison, verdicts)["by"]["category"]
    assert list(found) == ["fact", "poem"]
    assert [found[c]["count"] for c in found] == [2, 1]
    assert [found[c]["wins"]["reward"]["share"] for c in found] == [1.0, 0.0]
    assert found["fact"]["wins"]["gold"]["tie_rate"] == 0.5
    assert found["poem"]["wins"]["judge"]["share"] == 0.5
    show_comparison(Console(), comparison, verdicts)
    out = " ".join(capsys.readouterr().out.split())
    assert "by category" in out and "fact (2)" in out
    assert "judge (1 tie, 33%)" in out


def test_a_prompt_without_the_field_is_named() -> None:
    prompts = [g.prompt for g in asked(["fact", None])]
    with pytest.raises(InputError, match=r"p.jsonl: row 'p1' has no field 'category'; add it"):
        strata("p.jsonl", prompts, "category")


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_no_win_for_either_side(wrong: float) -> None:
    before = evaluation([1.0, 2.0, 3.0], model=[1.0, 2.0, 3.0], gold=[wrong, 1.0, 1.0])
    after = evaluation([2.0, wrong, 4.0], model=[2.0, wrong, 4.0], gold=[2.0, 2.0, 0.0])
    assert listed(before, after) == {
        "reward": [[1.0, 3.0], [2.0, 4.0]],
        "gold": [[1.0, 1.0], [2.0, 0.0]],
    }
    with pytest.raises(InputError, match="no prompt has a reward that is a finite number"):
        listed(evaluation([wrong]), evaluation([1.0]))
