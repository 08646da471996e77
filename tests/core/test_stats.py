"""Win rates with intervals that hold what they promise."""

import pytest

from mlx_grpo.core.stats import WinRate, win_rate


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
