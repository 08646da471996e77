"""From sampled groups to what the update needs: log-probs, KL, shaped rewards, advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_grpo.grpo import AdvantageScale, group_advantages, kl_k1, kl_k3_sum
from mlx_grpo.guard import check_finite
from mlx_grpo.logprob import token_logps
from mlx_grpo.models.stages import Stages
from mlx_grpo.padding import completion_arrays
from mlx_grpo.rewards import ScoreNormalizer
from mlx_grpo.stopping import SafePoint, never_stop
from mlx_grpo.types import Group, ScoredGroup


@dataclass(frozen=True)
class Measures:
    """What scoring learns about a rollout."""

    tokens: int
    kl: float
    """Mean k3 to the reference, nats per token: what controller and gates read."""
    kl_k1: float
    """Mean k1, unbiased and noisy."""
    logp_gap: float
    """Largest difference between a log-prob at rollout time and the recomputed one."""
    dead_groups: int
    """Groups whose advantages are all zero."""


def score(
    groups: Sequence[Group],
    raw_PK: Sequence[Sequence[float]],
    actor: Stages,
    reference: Stages,
    normalizer: ScoreNormalizer,
    kl_penalty: float,
    temperature: float,
    scale: AdvantageScale,
    safe_point: SafePoint = never_stop,
) -> tuple[list[ScoredGroup], Measures]:
    """Recompute log-probs under both, shape rewards (z - penalty * KL), take advantages.

    Raises:
        NotFinite: log-probs of some groups are not finite.
    """
    scored: list[ScoredGroup] = []
    tokens = dead = 0
    k1 = k3 = gap = 0.0
    sums_PK: list[list[float]] = []
    for group, raw_K in zip(groups, raw_PK, strict=True):
        safe_point()
        prompt_1S = mx.array([group.prompt.token_ids])
        tokens_KT, mask_KT = completion_arrays(group)
        old_KT, ref_KT = (
            token_logps(stages, prompt_1S, tokens_KT, mask_KT, temperature)
            for stages in (actor, reference)
        )
        sums_PK.append((old_KT + ref_KT).sum(axis=-1).tolist())
        kl_K = kl_k1(old_KT, ref_KT, mask_KT)
        shaped_K = mx.array([normalizer(r) for r in raw_K]) - kl_penalty * kl_K
        advantages_K = group_advantages(shaped_K[None], scale)[0]
        scored.append(
            ScoredGroup(group.prompt.token_ids, tokens_KT, mask_KT, old_KT, ref_KT, advantages_K)
        )
        lengths_K = mask_KT.sum(axis=-1)
        tokens += int(lengths_K.sum().item())
        k1 += (kl_K * lengths_K).sum().item()
        k3 += kl_k3_sum(old_KT, ref_KT, mask_KT).item()
        gap = max(gap, _logp_gap(group, old_KT))
        dead += not (advantages_K != 0).any().item()
    check_finite("logprob", sums_PK)
    return scored, Measures(tokens, k3 / tokens, k1 / tokens, gap, dead)


def _logp_gap(group: Group, old_KT: mx.array) -> float:
    recomputed = old_KT.tolist()
    return max(
        abs(sampled - again)
        for completion, row in zip(group.completions, recomputed, strict=True)
        for sampled, again in zip(
            completion.logps, row, strict=False
        )  # a row is padded on the right
    )
