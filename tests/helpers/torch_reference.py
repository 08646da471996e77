"""Textbook formulas in float64 PyTorch, row by row: what the MLX code is measured against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BOUND = 1e-5


def double(values: Any) -> torch.Tensor:
    """A float64 copy of an array."""
    return torch.from_numpy(np.array(values)).double()


def relative_difference(found: Any, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    expected = reference.detach().numpy()
    difference = np.abs(np.asarray(found, dtype=np.float64) - expected)
    assert difference.shape == expected.shape
    return float(difference.max() / np.abs(expected).max())


def report(what: str, *differences: float) -> float:
    """Print and return the largest of the differences."""
    largest = max(differences)
    print(f"\n{what}: largest relative difference {largest:.1e}")
    return largest


def group_advantages(rewards_PK: torch.Tensor, scale: str) -> torch.Tensor:
    """s - mean(s), for `std` divided by the sample standard deviation + 1e-4."""
    centred = rewards_PK - rewards_PK.mean(dim=1, keepdim=True)
    return centred if scale == "none" else centred / (rewards_PK.std(dim=1, keepdim=True) + 1e-4)


def normalized(batches: Sequence[torch.Tensor], alpha: float, limit: float) -> list[torch.Tensor]:
    """z of each batch under the moving mean and standard deviation that have seen it."""
    mean, std = batches[0].mean(), batches[0].std(correction=0)
    z = []
    for i, batch in enumerate(batches):
        if i:
            mean = alpha * mean + (1 - alpha) * batch.mean()
            std = alpha * std + (1 - alpha) * batch.std(correction=0)
        z.append(((batch - mean) / (std + 1e-6)).clamp(-limit, limit))
    return z


def clipped_surrogate(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
    low: float,
    high: float,
    level: str,
    aggregation: str,
    max_tokens: int,
) -> torch.Tensor:
    """PPO's loss over completions (logp [T_i], old_logp [T_i], advantage), each without padding."""
    terms = []
    for logp, old_logp, advantage in rows:
        log_ratio = logp - old_logp
        ratio = (log_ratio.mean().expand_as(log_ratio) if level == "sequence" else log_ratio).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
    if aggregation == "sequence":
        return torch.stack([t.mean() for t in terms]).mean()
    if aggregation == "token":
        return torch.cat(terms).mean()
    return torch.stack([t.sum() / max_tokens for t in terms]).mean()


def kl_k1(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of one completion of log p / q."""
    return (logp - ref_logp).mean()


def kl_k3_sum(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of q / p - 1 - log(q / p)."""
    return ((ref_logp - logp).exp() - 1 - (ref_logp - logp)).sum()


def bradley_terry(scores_K: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """-sum log sigmoid(chosen - rejected)."""
    return -sum(
        (torch.nn.functional.logsigmoid(scores_K[c] - scores_K[r]) for c, r in pairs),
        start=torch.zeros((), dtype=torch.float64),
    )
