"""The moving mean and standard deviation that put raw scores on one scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

EPSILON = 1e-6


@dataclass(frozen=True)
class ScoreNormalizer:
    """Exponential moving mean and standard deviation of raw scores, started from the first batch;
    the standard deviation from the first that has one: grown from zero it would clip every score
    for a hundred batches.

    mean <- alpha * mean + (1 - alpha) * mean(batch), std likewise; z = clip((r - mean) / (std +
    eps), -limit, limit).
    """

    alpha: float = 0.99
    limit: float = 5.0
    mean: float | None = None
    std: float | None = None

    def observe(self, scores: Sequence[float]) -> "ScoreNormalizer":
        """The normaliser after a batch of raw scores (population standard deviation)."""
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        if self.mean is None or self.std is None:
            return ScoreNormalizer(self.alpha, self.limit, mean, std)
        a = self.alpha
        moved = std if self.std < EPSILON else a * self.std + (1 - a) * std
        return ScoreNormalizer(a, self.limit, a * self.mean + (1 - a) * mean, moved)

    def __call__(self, score: float) -> float:
        """z of one raw score."""
        if self.mean is None or self.std is None:
            raise RuntimeError("a normaliser must observe a batch before it can normalise")
        return min(max((score - self.mean) / (self.std + EPSILON), -self.limit), self.limit)
