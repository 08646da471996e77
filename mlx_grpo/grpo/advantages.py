"""From rewards to advantages: normalised scores, shaped by the KL, minus the group's mean.

    A_i = s_i - mean(s)        s_i = z_i - beta * KL_i

Shao et al. 2024, arXiv:2402.03300, section 4.1.2. A_i is not divided by std(s) unless asked (Liu et
al. 2025, arXiv:2503.20783).
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_grpo.core.finite import check_finite
from mlx_grpo.core.types import RewardedGroup, TrainingGroup
from mlx_grpo.grpo.kl_estimators import kl_k1

AdvantageScale = Literal["none", "std"]
STD_EPSILON = 1e-4


def group_advantages(rewards_PK: mx.array, scale: AdvantageScale = "none") -> mx.array:
    """Advantages [P, K]: reward minus group mean, optionally divided by the group's deviation.

    Source: arXiv:2402.03300, section 4.1.2; `none` is Dr. GRPO's choice, arXiv:2503.20783, section
    3.1. The standard deviation is the sample one (K - 1), as in TRL.
    """
    centred_PK = rewards_PK - rewards_PK.mean(axis=-1, keepdims=True)
    # Equal rewards must give exact zeros: a group without a preference costs no update.
    equal_P1 = (rewards_PK == rewards_PK[:, :1]).all(axis=-1, keepdims=True)
    centred_PK = mx.where(equal_P1, 0.0, centred_PK)
    if scale == "std":
        ddof = 1 if rewards_PK.shape[-1] > 1 else 0
        centred_PK = centred_PK / (
            mx.std(rewards_PK, axis=-1, keepdims=True, ddof=ddof) + STD_EPSILON
        )
    return centred_PK


@dataclass(frozen=True)
class Shaping:
    """How log-probs and scores become advantages."""

    kl_penalty: float
    """Weight of a completion's KL in its reward, in normalised score per (nat per token)."""
    scale: AdvantageScale = "none"


def compute_advantages(
    group: RewardedGroup, old_logp_KT: mx.array, shaping: Shaping
) -> TrainingGroup:
    """Shape the scores, s = z - beta * KL, and subtract the group's mean.

    Raises:
        NotFinite: a log-prob is not finite.
    """
    kl_K = kl_k1(old_logp_KT, group.ref_logp_KT, group.mask_KT)
    check_finite("logprob", {group.position: kl_K.tolist()})
    shaped_K = group.scores_K - shaping.kl_penalty * kl_K
    return TrainingGroup(
        prompt_ids=group.prompt_ids,
        tokens_KT=group.tokens_KT,
        mask_KT=group.mask_KT,
        old_logp_KT=old_logp_KT,
        ref_logp_KT=group.ref_logp_KT,
        advantages_K=group_advantages(shaped_K[None], shaping.scale)[0],
    )


def is_dead(group: TrainingGroup) -> bool:
    """Whether all advantages are zero: such a group would change nothing."""
    return not bool((group.advantages_K != 0).any().item())
