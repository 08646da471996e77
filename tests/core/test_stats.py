"""Win rates with intervals that hold what they promise."""

from itertools import combinations

import pytest

from mlx_grpo.core.stats import (
    WinRate,
    cohens_d,
    mean_interval,
    pass_at_k,
    pass_rates,
    repetition,
    win_rate,
)


@pytest.mark.parametrize(
    ("wins", "prompts", "low", "high"),
    [
        # R. G. Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_the_wilson_interval_has_the_published_values(
    wins: float, prompts: int, low: float, high: float
) -> None:
    assert WinRate(wins, prompts).wilson() == pytest.approx((low, high), abs=5e-5)


def test_the_interval_narrows_with_more_prompts_and_holds_the_share() -> None:
    few, many = WinRate(6, 10), WinRate(600, 1000)
    for rate in (few, many):
        low, high = rate.wilson()
        assert low < rate.share < high
    assert many.wilson()[1] - many.wilson()[0] < (few.wilson()[1] - few.wilson()[0]) / 5


def test_ties_are_said_in_words() -> None:
    assert win_rate([1.0] * 4, [2.0, 0.0, 1.0, 1.0]).tied == "2 ties"
    assert win_rate([0.0, 1.0], [0.0, 2.0]).tied == "1 tie"
    assert win_rate([0.0], [1.0]).tied == ""


def test_ties_count_half() -> None:
    assert win_rate([1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0]) == WinRate(2.0, 4, ties=2)
    assert win_rate([0.0] * 5, [0.0] * 5).share == 0.5


def test_the_second_policy_is_the_one_that_wins() -> None:
    assert win_rate([0.0, 0.0], [1.0, 1.0]).share == 1.0
    assert win_rate([1.0, 1.0], [0.0, 0.0]).share == 0.0


def test_policies_are_compared_on_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0], [1.0, 2.0])


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer() -> None:
    answers = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        subsets = list(combinations(answers, k))
        assert pass_at_k(2, 5, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_rates_are_means_over_prompts_of_rewards_that_are_0_or_1() -> None:
    scores = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert pass_rates(scores, 4) == {"mean@4": 5 / 8, "pass@2": 0.75, "pass@4": 1.0}
    assert pass_rates([1.0, 0.0, 0.0], 3).keys() == {"mean@3", "pass@2", "pass@3"}
    assert pass_rates([None, 1.0, 1.0, 0.0], 2) == {"mean@2": 0.5, "pass@2": 1.0}
    assert pass_rates([0.5, 1.0], 2) == pass_rates([None, None], 2) == {}
    assert pass_rates([1.0, 0.0], 1) == {}


def test_the_interval_of_a_mean_is_students() -> None:
    # 2, 4, 9: mean 5, deviation 3.6056, t(2) = 4.303
    assert mean_interval([2.0, 4.0, 9.0]) == pytest.approx((-3.957, 13.957), abs=1e-3)
    low, high = mean_interval([0.0, 1.0] * 50)
    assert 0.5 - low == pytest.approx(high - 0.5) == pytest.approx(0.1026, abs=1e-3)


def test_an_interval_of_a_share_stays_within_0_and_1() -> None:
    for n in range(1, 300):
        low, high = WinRate(0.0, n).wilson()
        assert 0 <= low < 1e-12 < high < 1 and f"{low:.0%}" == "0%"
        low, high = WinRate(float(n), n).wilson()
        assert 0 < low < 1 - 1e-12 < high <= 1


def test_an_effect_size_is_in_pooled_deviations() -> None:
    assert cohens_d([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == 1.0
    assert cohens_d([1.0], [2.0]) is cohens_d([1.0, 1.0], [2.0, 2.0]) is None


def test_repetition_is_the_share_of_n_grams_that_came_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([7] * 8) == 1 - 1 / 5
    assert repetition([1, 2, 1, 2, 1], n=2) == 1 - 2 / 4
