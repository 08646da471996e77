"""GDPO: a reward of large numbers does not drown a reward of small ones."""

from statistics import mean, stdev

import pytest

from mlx_grpo.rewards.decoupled import decoupled_scores


def test_scores_are_the_formula_of_the_paper() -> None:
    by_source = {"right": [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], "short": [9.0, 3.0, 0.0, 0.0, 5.0, 1.0]}
    weights = {"right": 1.0, "short": 0.5}

    def unit(values: list[float]) -> list[float]:
        return [(v - mean(values)) / (stdev(values) + 1e-4) for v in values]

    each = {n: [*unit(s[:3]), *unit(s[3:])] for n, s in by_source.items()}
    whole = unit([r + 0.5 * s for r, s in zip(each["right"], each["short"], strict=True)])
    found = decoupled_scores(by_source, weights, 3)
    assert [s for row in found for s in row] == pytest.approx(whole)


def test_the_size_of_a_reward_does_not_decide() -> None:
    right, short = [1.0, 0.0, 0.0, 1.0], [0.0, 0.3, 0.1, 0.2]
    weights = {"right": 1.0, "short": 1.0}
    small = decoupled_scores({"right": right, "short": short}, weights, 4)
    large = decoupled_scores({"right": right, "short": [1e4 * s for s in short]}, weights, 4)
    assert large[0] == pytest.approx(small[0], abs=2e-3)


def test_a_group_that_no_reward_tells_apart_has_equal_scores() -> None:
    by_source = {"right": [1.0, 1.0, 0.0, 1.0], "short": [7.0, 7.0, 2.0, 1.0]}
    equal, _ = decoupled_scores(by_source, {"right": 1.0, "short": 1.0}, 2)
    assert equal[0] == equal[1]


def test_what_is_only_measured_and_what_has_no_score_count_for_nothing() -> None:
    by_source = {"right": [1.0, None, 0.0, None], "gold": [5.0, 1.0, 9.0, 2.0]}
    (scores,) = decoupled_scores(by_source, {"right": 1.0}, 4)
    assert scores[0] == -scores[2] and scores[1] == scores[3] == 0
