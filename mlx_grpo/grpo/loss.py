"""The loss of GRPO: PPO's clipped surrogate with group-relative advantages, pure.

For one prompt with K answers (Shao et al. 2024, arXiv:2402.03300, section 4.1):

    ratio_t = exp(logp_t - old_logp_t)
    L       = -sum_t w_t * min(ratio_t * A_i, clip(ratio_t, 1 - eps_low, 1 + eps_high) * A_i)

The weights w sum to one over the real tokens of a minibatch, or to a constant (Dr. GRPO). There is
no KL term in the loss: the KL to the reference is held by `kl_controller.py`.
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_grpo.grpo.kl_estimators import kl_k3_sum

Aggregation = Literal["sequence", "token", "constant"]
RatioLevel = Literal["token", "sequence"]


def token_weights(
    mask_KT: mx.array, aggregation: Aggregation, completions: int, tokens: int, max_tokens: int
) -> mx.array:
    """Weight of every token of one group, [K, T], in the loss of a minibatch.

    Args:
        mask_KT: 1 on real completion tokens.
        aggregation: `sequence`: mean over tokens, then over completions; `token`: mean over all
            tokens (DAPO, arXiv:2503.14476, eq. 8); `constant`: sum over tokens divided by the
            longest possible completion, mean over completions (Dr. GRPO, arXiv:2503.20783).
        completions: completions in the minibatch.
        tokens: real completion tokens in the minibatch.
        max_tokens: the sampling limit.
    """
    if aggregation == "token":
        return mask_KT / tokens
    if aggregation == "constant":
        return mask_KT / (completions * max_tokens)
    return mask_KT / (mx.maximum(mask_KT.sum(axis=-1, keepdims=True), 1) * completions)


@dataclass(frozen=True)
class Clip:
    """Clip range of the ratio and the level at which the ratio is taken."""

    low: float = 0.2
    high: float = 0.2
    level: RatioLevel = "token"
    """`token`: each token's own ratio; `sequence`: one ratio per completion, the geometric mean
    (GSPO, arXiv:2507.18071)."""


def log_ratio(
    logp_KT: mx.array, old_logp_KT: mx.array, mask_KT: mx.array, level: RatioLevel
) -> mx.array:
    """Log of the importance ratio, [K, T]; at sequence level the same number along a row."""
    difference_KT = (logp_KT - old_logp_KT) * mask_KT
    if level == "token":
        return difference_KT
    mean_K1 = difference_KT.sum(axis=-1, keepdims=True) / mx.maximum(
        mask_KT.sum(axis=-1, keepdims=True), 1
    )
    return mx.broadcast_to(mean_K1, mask_KT.shape)


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a group's completions is taken from, beside their log-probs."""

    old_logp_KT: mx.array
    """Log-probs under the policy before the iteration's first step."""
    advantages_K: mx.array
    mask_KT: mx.array
    """1 on real completion tokens."""
    weights_KT: mx.array
    """See `token_weights`."""


def clipped_surrogate(
    logp_KT: mx.array, inputs: LossInputs, clip: Clip
) -> tuple[mx.array, dict[str, mx.array]]:
    """PPO's clipped surrogate, negated and weighted.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    Returns:
        (the loss, a scalar; sums over real tokens: `clipped`, ratios whose gradient the clip
        removes, at sequence level completions; `kl`, k3 between the old and the current policy;
        `tokens`, how many there are).
    """
    ratio_KT = mx.exp(log_ratio(logp_KT, inputs.old_logp_KT, inputs.mask_KT, clip.level))
    clipped_KT = mx.clip(ratio_KT, 1 - clip.low, 1 + clip.high)
    up_K1 = inputs.advantages_K[:, None]
    loss = -(inputs.weights_KT * mx.minimum(ratio_KT * up_K1, clipped_KT * up_K1)).sum()
    outside_KT = ((up_K1 > 0) & (ratio_KT > 1 + clip.high)) | (
        (up_K1 < 0) & (ratio_KT < 1 - clip.low)
    )
    silenced_KT = outside_KT * inputs.mask_KT
    metrics = {
        "clipped": (silenced_KT if clip.level == "token" else silenced_KT.max(axis=-1)).sum(),
        "kl": kl_k3_sum(logp_KT, inputs.old_logp_KT, inputs.mask_KT),
        "tokens": inputs.mask_KT.sum(),
    }
    return loss, metrics
