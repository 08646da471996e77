"""How good is a reward model on held-out pairs: accuracy beside what the lengths alone would tell,
and whether its probabilities mean what they say.

p(chosen wins) = sigmoid((r(chosen) - r(rejected)) / T)

T, the temperature, is 1 as trained; the one fitted on held-out pairs (Guo et al. 2017,
arXiv:1706.04599, section 4.2) changes no ranking and no score, only this probability.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_grpo.console.output import Console
from mlx_grpo.core.stats import WinRate
from mlx_grpo.data.pairs import PairGroup
from mlx_grpo.models.reward_model import RewardModel

BINS = 10
FOLDS = 5
SIMILAR = 0.2  # lengths that differ by at most this share of the longer one
COLDEST, HOTTEST = 0.01, 100.0
SHOWN = 20
"""Most values of a field in a table."""
RANKING_COLUMNS = ("pairs", "accuracy (95 % interval)", "longer wins", "shorter wins")


@dataclass(frozen=True)
class JudgedPair:
    """What a reward model said about one pair."""

    difference: float
    """Score of the chosen answer minus score of the rejected one."""
    chosen_tokens: int
    rejected_tokens: int
    prompt: int
    """Which prompt it belongs to."""
    both_ended: bool = True
    """Whether both answers ended by themselves; the others were cut off."""


@dataclass(frozen=True)
class Bin:
    """Pairs whose winner was called with about the same confidence."""

    pairs: int
    confidence: float
    """Mean of max(p, 1 - p)."""
    accuracy: float
    """Share of them ranked as labelled."""


@dataclass(frozen=True)
class Ranking:
    """How many pairs are ranked as labelled, and how many a glance at the lengths would get."""

    pairs: int
    accuracy: float
    """Share of pairs ranked as labelled; equal scores count half."""
    interval: tuple[float, float]
    """Of the accuracy: Wilson, 95 %, as if pairs of one prompt were independent."""
    longer_wins: float
    """Share of pairs whose longer answer, in tokens, is the chosen one; equal lengths count
    half."""
    shorter_wins: float


@dataclass(frozen=True)
class Quality(Ranking):
    """Figures of a reward model on held-out pairs."""

    similar_length: Ranking | None
    """The same on pairs whose lengths differ by at most 20 %; None where there are none."""
    both_ended: Ranking | None
    """The same on pairs whose answers both ended by themselves; None where all did, or none."""
    loss: float
    """Mean of -log p(chosen wins)."""
    calibration_error: float
    """Expected calibration error as trained, T = 1."""
    bins: tuple[Bin, ...]
    temperature: float
    """Fitted on all of these pairs."""
    calibrated_error: float | None
    """Expected calibration error with a temperature fitted on other prompts than it is measured on
    (five folds); None for pairs of one prompt."""
    calibrated_bins: tuple[Bin, ...]


def judged_pairs(model: RewardModel, groups: Sequence[PairGroup], stop: int) -> list[JudgedPair]:
    """Score every answer once.

    Args:
        stop: the token that ends an answer, see `end_of_turn`.
    """
    judged = []
    for i, group in enumerate(groups):
        scores = model.score_ids(group.prompt_ids, list(group.answers))
        tokens = list(map(len, group.answers))
        ended = [ids[-1] == stop for ids in group.answers]
        judged += [
            JudgedPair(
                scores[chosen] - scores[rejected],
                tokens[chosen],
                tokens[rejected],
                i,
                ended[chosen] and ended[rejected],
            )
            for chosen, rejected in group.pairs
        ]
    return judged


def quality(pairs: Sequence[JudgedPair]) -> Quality:
    """All figures; at least one pair is needed."""
    similar = [p for p in pairs if _similar(p.chosen_tokens, p.rejected_tokens)]
    ended = [p for p in pairs if p.both_ended]
    differences = [p.difference for p in pairs]
    as_trained = calibration_bins([probability(d) for d in differences])
    calibrated = calibration_bins(cross_fitted(pairs))
    return Quality(
        **vars(ranking(pairs)),
        similar_length=ranking(similar) if similar else None,
        both_ended=ranking(ended) if 0 < len(ended) < len(pairs) else None,
        loss=pair_loss(differences),
        calibration_error=calibration_error(as_trained),
        bins=as_trained,
        temperature=fit_temperature(differences),
        calibrated_error=calibration_error(calibrated) if calibrated else None,
        calibrated_bins=calibrated,
    )


def ranking(pairs: Sequence[JudgedPair]) -> Ranking:
    """Accuracy, and that of the two rules that look at nothing but the length."""
    won = WinRate(sum(_wins(p.difference) for p in pairs), len(pairs))
    longer = sum(_wins(p.chosen_tokens - p.rejected_tokens) for p in pairs) / len(pairs)
    return Ranking(len(pairs), won.share, won.wilson(), longer, 1 - longer)


def _similar(a: int, b: int) -> bool:
    return abs(a - b) <= SIMILAR * max(a, b)


def _wins(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def probability(difference: float, temperature: float = 1.0) -> float:
    """sigmoid(difference / temperature), however far out."""
    small = math.exp(-abs(difference) / temperature)
    return 1 / (1 + small) if difference >= 0 else small / (1 + small)


def pair_loss(differences: Sequence[float]) -> float:
    """Mean of -log sigmoid(difference)."""
    return sum(math.log1p(math.exp(-abs(d))) + max(-d, 0.0) for d in differences) / len(differences)


def calibration_bins(probabilities: Sequence[float]) -> tuple[Bin, ...]:
    """Probabilities of the chosen answer, folded to a confidence in [0.5, 1], in bins of equal
    width; empty bins are left out."""
    slots: list[list[float]] = [[] for _ in range(BINS)]
    for p in probabilities:
        slots[min(int((max(p, 1 - p) - 0.5) * 2 * BINS), BINS - 1)].append(p)
    return tuple(
        Bin(
            pairs=len(slot),
            confidence=sum(max(p, 1 - p) for p in slot) / len(slot),
            accuracy=sum(_wins(p - 0.5) for p in slot) / len(slot),
        )
        for slot in slots
        if slot
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): the gap between confidence and accuracy,
    weighted by pairs."""
    gaps = sum(b.pairs * abs(b.accuracy - b.confidence) for b in bins)
    return gaps / sum(b.pairs for b in bins)


def fit_temperature(differences: Sequence[float]) -> float:
    """The T in [0.01, 100] with the least mean -log sigmoid(difference / T).

    The loss is convex in 1 / T, so its slope crosses zero once; where it does not (every pair
    right, or most of them wrong) the bound is returned.
    """

    def slope(log_t: float) -> float:
        """Of the loss in 1 / T."""
        return -sum(d * probability(-d, math.exp(log_t)) for d in differences)

    low, high = math.log(COLDEST), math.log(HOTTEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) < 0 else (middle, high)
    return math.exp((low + high) / 2)


def cross_fitted(pairs: Sequence[JudgedPair]) -> list[float]:
    """p(chosen wins) of each pair, with the temperature that the prompts of other folds ask for;
    empty for pairs of one prompt."""
    if len({p.prompt for p in pairs}) < 2:
        return []
    found = []
    for fold in range(FOLDS):
        others = [p.difference for p in pairs if p.prompt % FOLDS != fold]
        inside = [p.difference for p in pairs if p.prompt % FOLDS == fold]
        if inside:
            temperature = fit_temperature(others)
            found += [probability(d, temperature) for d in inside]
    return found


def show_quality(ui: Console, found: Quality, title: str = "Held-out pairs") -> None:
    """Two tables: ranking beside the length rules, and confidence beside accuracy."""
    rows = [
        ("all", found),
        (f"lengths within {SIMILAR:.0%}", found.similar_length),
        ("both answers end", found.both_ended),
    ]
    ui.table(
        f"{title}, loss {found.loss:.3f}",
        ("", *RANKING_COLUMNS),
        [(name, *_ranking_cells(side)) for name, side in rows if side],
    )
    after = found.calibrated_error
    ui.table(
        f"Calibration error {found.calibration_error:.3f}"
        + ("" if after is None else f"; {after:.3f} with a temperature fitted on other prompts"),
        ("", "pairs", "confidence", "accuracy"),
        [
            (name, str(b.pairs), f"{b.confidence:.1%}", f"{b.accuracy:.1%}")
            for name, bins in (("as trained", found.bins), ("calibrated", found.calibrated_bins))
            for b in bins
        ],
    )
    ui.say(f"temperature {found.temperature:.2f}: p(first wins) = sigmoid((r1 - r2) / temperature)")
    rule = max(found.longer_wins, found.shorter_wins)
    if found.interval[0] <= rule:
        name = "longer" if rule == found.longer_wins else "shorter"
        ui.warn(
            f"the {name} answer wins in {rule:.1%} of these pairs; the interval does not show the "
            "reward model to be better than that rule"
        )


def show_by_field(ui: Console, field: str, found: Mapping[str, Ranking]) -> None:
    """A table with a line for each value of a field, the most frequent first."""
    rows = sorted(found.items(), key=lambda item: -item[1].pairs)
    ui.table(
        f"By {field}",
        (field, *RANKING_COLUMNS),
        [(value, *_ranking_cells(side)) for value, side in rows[:SHOWN]],
    )
    if len(rows) > SHOWN:
        ui.say(f"and {len(rows) - SHOWN} further values of {field}, with fewer pairs each")


def _ranking_cells(side: Ranking) -> tuple[str, ...]:
    low, high = side.interval
    accuracy = f"{side.accuracy:.1%} ({low:.0%} to {high:.0%})"
    return str(side.pairs), accuracy, f"{side.longer_wins:.1%}", f"{side.shorter_wins:.1%}"
