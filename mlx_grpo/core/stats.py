"""Win rates with intervals, ranks, and correlation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import TypeVar

T = TypeVar("T")


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, the mean rank where several are equal."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation coefficient; where one does not vary, 1 if the other does not either, else 0."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return covariance / spread if spread else float(min(a) == max(a) and min(b) == max(b))


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the second policy scores higher; ties count half."""

    wins: float
    """Ties as halves."""
    prompts: int
    ties: int = 0

    @property
    def share(self) -> float:
        return self.wins / self.prompts

    def wilson(self, z: float = 1.959964) -> tuple[float, float]:
        """95 % interval (E. B. Wilson 1927, J. Am. Stat. Assoc. 22, p. 209)."""
        n, p = self.prompts, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.wilson()
        return f"{self.share:.0%} ({low:.0%} to {high:.0%})"

    @property
    def tied(self) -> str:
        """The number of ties in words; empty where there are none."""
        return f"{self.ties} {'tie' if self.ties == 1 else 'ties'}" if self.ties else ""


def win_rate(before: Sequence[float], after: Sequence[float]) -> WinRate:
    """Compare two policies prompt by prompt."""
    wins = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a, b in zip(before, after, strict=True))
    return WinRate(wins, len(before), sum(a == b for a, b in zip(before, after, strict=True)))


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a text that came before in it (seq-rep-n, Welleck et al. 2019,
    arXiv:1908.04319); 0 for a shorter text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
    *(2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; the last one serves beyond."""


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean by Student's t, of two values or more."""
    count, mean = len(values), fmean(values)
    half = STUDENT[min(count - 1, len(STUDENT)) - 1] * stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def cohens_d(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Difference of the means over the pooled standard deviation (J. Cohen 1988, eq. 2.5.1); None
    where neither varies, or one value shows no variance."""
    if len(before) < 2:
        return None
    spread = math.sqrt((variance(before) + variance(after)) / 2)
    return (fmean(after) - fmean(before)) / spread if spread else None


def pass_at_k(right: int, n: int, k: int) -> float:
    """Chance that one of k answers is right, estimated without bias from n of which some are:

        1 - C(n - right, k) / C(n, k)

    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def pass_rates(scores: Sequence[float | None], n: int) -> dict[str, float]:
    """`mean@n`, and `pass@k` for k = 2, 4, ... and n, as means over prompts; none where a score is
    neither 0 nor 1, or where there is one answer per prompt.

    Args:
        scores: of n answers per prompt, prompt by prompt; a prompt with a None is left out.
    """
    answers = [scores[i : i + n] for i in range(0, len(scores), n)]
    known = [[s for s in row if s is not None] for row in answers]
    right = [sum(row) for row in known if len(row) == n]
    if n == 1 or not right or not {s for row in known for s in row} <= {0, 1}:
        return {}
    ks = sorted({*(2**i for i in range(1, n.bit_length()) if 2**i <= n), n})
    passed = {f"pass@{k}": [pass_at_k(int(c), n, k) for c in right] for k in ks}
    return {
        f"mean@{n}": sum(right) / (n * len(right)),
        **{name: sum(shares) / len(shares) for name, shares in passed.items()},
    }


def source_means(by_source: Mapping[str, Sequence[float | None]], prefix: str) -> dict[str, float]:
    """Mean score of each reward source where it applies, as `PREFIX/NAME/mean`; none for a source
    that applies nowhere."""
    known = {name: [s for s in scores if s is not None] for name, scores in by_source.items()}
    return {f"{prefix}/{name}/mean": sum(s) / len(s) for name, s in known.items() if s}


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Up to `count` of the items from the first to the last, at equal distances."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]
