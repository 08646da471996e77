"""Win rates with intervals, ranks, and correlation."""

import math
from collections.abc import Sequence


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
