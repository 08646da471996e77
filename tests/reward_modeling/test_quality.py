"""Figures of a reward model on cases done by hand."""

import math

import pytest

from mlx_grpo.console.output import Console
from mlx_grpo.core.rng import uniforms
from mlx_grpo.data.pairs import PairGroup
from mlx_grpo.reward_modeling.quality import (
    Bin,
    JudgedPair,
    calibration_bins,
    calibration_error,
    cross_fitted,
    fit_temperature,
    judged_pairs,
    pair_loss,
    probability,
    quality,
    ranking,
    show_quality,
)


@pytest.mark.parametrize(
    ("probabilities", "error"),
    [
        ([1.0, 1.0], 0.0),  # sure and right
        ([0.0, 0.0], 1.0),  # sure and wrong
        ([0.5] * 4, 0.0),  # undecided, and right half of the time
        ([0.9] * 9 + [0.1], 0.0),  # 90 % sure, right nine times of ten
        ([0.9] * 5 + [0.1] * 5, 0.4),  # 90 % sure, right half of the time
        ([0.72, 0.28], 0.22),
        ([1.0, 1.0, 0.52, 0.48], 0.01),  # (2 * 0 + 2 * 0.02) / 4
        ([0.61, 0.98], 0.205),  # (0.39 + 0.02) / 2: two bins do not cancel
        ([0.6, 0.99, 0.01], (0.4 + 2 * 0.49) / 3),
    ],
)
def test_calibration_error_of_cases_done_by_hand(probabilities: list[float], error: float) -> None:
    assert calibration_error(calibration_bins(probabilities)) == pytest.approx(error)


class Scores:
    """Stands in for a reward model: the score of an answer is its first token."""

    def score_ids(self, prompt_ids: tuple[int, ...], rows: list[tuple[int, ...]]) -> list[float]:
        return [float(r[0]) for r in rows]


def pairs_of(*differences: float, tokens: tuple[int, int] = (5, 9)) -> list[JudgedPair]:
    """A pair of its own prompt for each difference."""
    return [JudgedPair(d, *tokens, prompt=i) for i, d in enumerate(differences)]


def test_quality_of_a_case_done_by_hand() -> None:
    groups = [
        PairGroup((1,), ((3, 0, 0), (1, 0)), ((0, 1),)),  # right by 2, the longer one chosen
        PairGroup((2,), ((1,), (2, 0), (2, 1)), ((0, 1), (1, 2))),  # wrong by 1; undecided
    ]
    judged = judged_pairs(Scores(), groups, stop=0)  # type: ignore[arg-type]
    assert judged == [
        JudgedPair(2.0, 3, 2, 0, both_ended=True),
        JudgedPair(-1.0, 1, 2, 1, both_ended=False),
        JudgedPair(0.0, 2, 2, 1, both_ended=False),
    ]
    found = quality(judged)
    assert (found.pairs, found.accuracy) == (3, 0.5)
    assert (found.longer_wins, found.shorter_wins) == (0.5, 0.5)
    assert found.similar_length == ranking(judged[2:])
    assert found.both_ended == ranking(judged[:1])
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), math.log(2)]
    assert found.loss == pytest.approx(sum(losses) / 3)
    sure, unsure = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert found.calibration_error == pytest.approx((1 - sure + unsure) / 3)


@pytest.mark.parametrize(
    ("chosen", "rejected", "similar"),
    [(10, 10, True), (8, 10, True), (10, 8, True), (79, 100, False), (5, 9, False), (0, 0, True)],
)
def test_lengths_are_similar_within_a_fifth_of_the_longer_one(
    chosen: int, rejected: int, similar: bool
) -> None:
    found = quality(pairs_of(1.0, -2.0, tokens=(chosen, rejected)))
    assert (found.similar_length is not None) == similar
    assert found.both_ended is None  # all of them ended: it would say the same again


def test_the_rules_of_length_are_counted_apart_from_the_model() -> None:
    pairs = [
        JudgedPair(1.0, 9, 5, 0),  # the longer one chosen
        JudgedPair(1.0, 5, 9, 1),
        JudgedPair(1.0, 5, 9, 2),
        JudgedPair(-1.0, 5, 5, 3),
    ]
    found = ranking(pairs)
    assert (found.accuracy, found.longer_wins, found.shorter_wins) == (0.75, 0.375, 0.625)
    assert found.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)


def test_bins_say_how_sure_and_how_right() -> None:
    assert calibration_bins([0.91, 0.09, 0.93, 0.51]) == (
        Bin(1, 0.51, 1.0),
        Bin(3, pytest.approx((0.91 + 0.91 + 0.93) / 3), pytest.approx(2 / 3)),
    )
    assert sum(b.pairs for b in calibration_bins([i / 100 for i in range(101)])) == 101


def test_scores_far_apart_do_not_overflow() -> None:
    group = PairGroup((1,), ((0,), (5000,)), ((0, 1), (1, 0)))
    found = quality(judged_pairs(Scores(), [group], stop=0))  # type: ignore[arg-type]
    assert found.loss == 2500.0
    assert found.calibration_error == pytest.approx(0.5)
    assert (probability(1e6), probability(-1e6)) == (1.0, 0.0)


def drawn(scale: float, count: int = 2000) -> list[JudgedPair]:
    """Pairs whose label was drawn with sigmoid(d), judged by a model that says `scale` times d."""
    pairs = []
    u = uniforms(1, [("labels", i, j) for i in range(count) for j in (0, 1)]).tolist()
    for i in range(count):
        d = 6 * u[2 * i] - 3
        right = u[2 * i + 1] < probability(d)
        pairs.append(JudgedPair(scale * (d if right else -d), 5, 9, i))
    return pairs


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_undoes_a_wrong_scale(scale: float) -> None:
    pairs = drawn(scale)
    assert fit_temperature([p.difference for p in pairs]) == pytest.approx(scale, rel=0.1)
    found = quality(pairs)
    assert found.calibrated_error is not None
    assert found.calibrated_error < 0.03
    if scale != 1.0:
        assert found.calibration_error > 0.08
    assert found.accuracy == quality(drawn(1.0)).accuracy  # no ranking changes


def test_no_other_temperature_has_a_lower_loss() -> None:
    differences = [p.difference for p in drawn(3.0, 200)]
    best = fit_temperature(differences)

    def loss(temperature: float) -> float:
        return pair_loss([d / temperature for d in differences])

    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


@pytest.mark.parametrize(("difference", "bound"), [(1.0, 0.01), (-1.0, 100.0)])
def test_a_temperature_without_an_optimum_stops_at_its_bound(
    difference: float, bound: float
) -> None:
    assert fit_temperature([difference] * 5) == pytest.approx(bound)


def test_a_pair_has_no_say_in_its_own_temperature() -> None:
    pairs = pairs_of(*[2.0] * 4, -2.0)
    found = cross_fitted(pairs)
    assert len(found) == 5
    assert found[-1] == pytest.approx(0.0)  # the others were all right, so T is at its bound
    assert all(p == pytest.approx(0.75) for p in found[:4])  # three of four others right


def test_pairs_of_one_prompt_stay_in_one_fold() -> None:
    pairs = [JudgedPair(d, 5, 9, prompt=7) for d in (1.0, 2.0)]
    assert cross_fitted(pairs) == []
    assert quality(pairs).calibrated_error is None


def test_a_model_no_better_than_a_rule_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    show_quality(Console(), quality(pairs_of(1.0, 1.0, 1.0, -1.0)))  # the shorter one always wins
    shown = capsys.readouterr()
    assert "75.0% (30% to 95%)" in shown.out
    assert "the shorter answer wins in 100.0% of these pairs" in shown.err
    show_quality(Console(), quality(pairs_of(*[1.0] * 20, tokens=(5, 5))))
    assert capsys.readouterr().err == ""
