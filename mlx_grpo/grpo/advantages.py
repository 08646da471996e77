"""From rewards to advantages: normalised scores, shaped by the KL, minus the group's mean.

    A_i = s_i - mean(s)        s_i = z_i - beta * KL_i

Shao et al. 2024, arXiv:2402.03300, section 4.1.2. A_i is not divided by std(s) unless asked (Liu et
al. 2025, arXiv:2503.20783).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import mlx.core as mx

from mlx_grpo.core.padding import completion_arrays, rows_of, sampled_logps
from mlx_grpo.core.types import Group, TrainingGroup

AdvantageScale = Literal["none", "group", "batch", "std"]
STD_EPSILON = 1e-4


def group_advantages(
    rewards_PK: mx.array, scale: AdvantageScale = "none", batch_std: float = 1.0
) -> mx.array:
    """Advantages [P, K]: reward minus group mean, optionally divided by a deviation.

    Source: arXiv:2402.03300, section 4.1.2; `none` is Dr. GRPO's choice, arXiv:2503.20783, section
    3.1; `batch` that of Lite PPO, arXiv:2508.08221. The standard deviation is the sample one
    (K - 1), as in TRL.

    Args:
        batch_std: of all scores of the iteration, for `batch`.
    """
    centred_PK = rewards_PK - rewards_PK.mean(axis=-1, keepdims=True)
    # Equal rewards must give exact zeros: a group without a preference costs no update.
    equal_P1 = (rewards_PK == rewards_PK[:, :1]).all(axis=-1, keepdims=True)
    centred_PK = mx.where(equal_P1, 0.0, centred_PK)
    if scale == "batch":
        centred_PK = centred_PK / (batch_std + STD_EPSILON)
    if scale in ("group", "std"):
        ddof = 1 if rewards_PK.shape[-1] > 1 else 0
        centred_PK = centred_PK / (
            mx.std(rewards_PK, axis=-1, keepdims=True, ddof=ddof) + STD_EPSILON
        )
    return centred_PK


def rows_that_teach(scores_K: Sequence[float], m: int) -> list[int]:
    """The m of K completions whose scores vary most, in their order; all of them if m is 0.

    Among all subsets of m, one of the lowest few and the highest others has the largest variance
    (Xu et al. 2025, arXiv:2504.13818, lemma 3.1): m + 1 of them are compared.
    """
    if not 0 < m < len(scores_K):
        return list(range(len(scores_K)))
    order = sorted(range(len(scores_K)), key=lambda i: scores_K[i])

    def variance(low: int) -> float:
        chosen = [scores_K[i] for i in (*order[:low], *order[len(order) - m + low :])]
        mean = sum(chosen) / m
        return sum((s - mean) ** 2 for s in chosen)

    low = max(range(m + 1), key=variance)
    return sorted((*order[:low], *order[len(order) - m + low :]))


def training_group(
    position: int,
    group: Group,
    rows: Sequence[int],
    shaped_scores: Sequence[float],
    scale: AdvantageScale = "none",
    batch_std: float = 1.0,
) -> TrainingGroup:
    """Completions of a group with their advantages over one another.

    Args:
        position: of the group in the iteration.
        rows: which completions.
        shaped_scores: of these, as they are compared.
        batch_std: see `group_advantages`.
    """
    chosen = [group.completions[i] for i in rows]
    tokens_KT, mask_KT = completion_arrays(chosen)
    return TrainingGroup(
        position=position,
        prompt_ids=group.prompt.token_ids,
        tokens_KT=tokens_KT,
        mask_KT=mask_KT,
        sampled_logp_KT=sampled_logps(chosen),
        advantages_K=group_advantages(mx.array([list(shaped_scores)]), scale, batch_std)[0],
    )


def learned_from(group: TrainingGroup, rows: Sequence[int]) -> TrainingGroup:
    """The group with these rows alone in the loss. Their advantages are those over all rows. As in
    TRL, a mean over completions counts the others as zeros, one over tokens does not count them."""
    gone = group.mask_KT.shape[0] - len(rows)
    return replace(rows_of(group, rows), left_out=gone) if gone else group


def is_dead(group: TrainingGroup) -> bool:
    """Whether all advantages are zero: such a group would change nothing."""
    return not bool((group.advantages_K != 0).any().item())
