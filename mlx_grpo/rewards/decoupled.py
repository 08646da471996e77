"""Several rewards, each normalised within its group before they are summed: GDPO.

    A_i = sum_n w_n (r_n,i - mean(r_n)) / std(r_n)      over a group, for each reward n
    s_i = (A_i - mean(A)) / std(A)                      over the iteration

Liu et al. 2026, arXiv:2601.05242. Where rewards are summed as they are, the one of larger numbers
decides, and different answers end up with the same sum.
"""

from collections.abc import Mapping, Sequence
from statistics import stdev

EPSILON = 1e-4
"""As in TRL, where --multi-objective-aggregation comes from."""


def decoupled_scores(
    by_source: Mapping[str, Sequence[float | None]], weights: Mapping[str, float], k: int
) -> list[list[float]]:
    """Scores [P][K] of an iteration.

    Args:
        by_source: each reward's own scores [P * K]; None where it has nothing to say.
        weights: of those that count.
    """
    count = len(next(iter(by_source.values())))
    total = [0.0] * count
    for name, weight in weights.items():
        for start in range(0, count, k):
            normalised = _normalised(by_source[name][start : start + k])
            for i, score in enumerate(normalised, start):
                total[i] += weight * score
    whole = _normalised(total)
    return [whole[start : start + k] for start in range(0, count, k)]


def _normalised(scores: Sequence[float | None]) -> list[float]:
    """Minus the mean, divided by the sample standard deviation; 0 where there is no score, and for
    all of them where they do not differ."""
    given = [s for s in scores if s is not None]
    if len(set(given)) < 2:
        return [0.0] * len(scores)
    mean, spread = sum(given) / len(given), stdev(given) + EPSILON
    return [0.0 if s is None else (s - mean) / spread for s in scores]
