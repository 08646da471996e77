"""The learning rate over a run: a factor for each iteration.

As in transformers' schedules of the same names, counted in iterations: with N iterations, the first
w of them warm-up, and i counted from 0,

    warm-up  (i + 1) / (w + 1)      linear  (N - i) / (N - w)      cosine  (1 + cos(pi p)) / 2

with p = (i - w) / (N - w). Their warm-up begins at a rate of zero, which would waste a rollout.
"""

import math
from typing import Literal

Scheduler = Literal["constant", "linear", "cosine"]


def rate_factor(
    iteration: int, num_iterations: int, scheduler: Scheduler = "constant", warmup: float = 0.0
) -> float:
    """What the learning rate of an iteration, counted from 0, is multiplied by: above 0, at most 1.

    Args:
        warmup: share of the iterations that are warm-up.
    """
    rising = math.ceil(warmup * num_iterations)
    if iteration < rising:
        return (iteration + 1) / (rising + 1)
    progress = (iteration - rising) / max(num_iterations - rising, 1)
    if scheduler == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if scheduler == "cosine" else 1.0
