"""From sampled groups to what the update needs: log-probs, KL, shaped rewards, advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_grpo.core.finite import check_finite
from mlx_grpo.core.padding import completion_arrays
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group, RatedGroup, ScoredGroup
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo import AdvantageScale, group_advantages, kl_k1, kl_k3_sum
from mlx_grpo.logprob import token_logps
from mlx_grpo.models.decoder import Stages
from mlx_grpo.rewards.normalizer import ScoreNormalizer


@dataclass(frozen=True)
class Shaping:
    """How log-probs and scores become advantages."""

    kl_penalty: float
    """Weight of a completion's KL in its reward, in normalised score per (nat per token)."""
    scale: AdvantageScale = "none"


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


def rate(
    groups: Sequence[Group],
    raw_PK: Sequence[Sequence[float]],
    reference: Stages,
    normalizer: ScoreNormalizer,
    temperature: float,
    safe_point: SafePoint = never_stop,
    share: slice = slice(None),
) -> list[RatedGroup]:
    """Normalise raw scores and take log-probs under the reference, of the groups of the share."""
    rated = []
    for position, (group, raw_K) in list(enumerate(zip(groups, raw_PK, strict=True)))[share]:
        safe_point()
        ids = group.prompt.token_ids
        tokens_KT, mask_KT = completion_arrays(group)
        ref_KT = token_logps(reference, mx.array([ids]), tokens_KT, mask_KT, temperature)
        scores_K = mx.array([normalizer(r) for r in raw_K])
        rated.append(RatedGroup(position, ids, tokens_KT, mask_KT, ref_KT, scores_K))
    return rated


def score(group: RatedGroup, old_logp_KT: mx.array, shaping: Shaping) -> ScoredGroup:
    """Shape the scores, z - penalty * KL, and take advantages.

    Raises:
        NotFinite: a log-prob is not finite.
    """
    kl_K = kl_k1(old_logp_KT, group.ref_logp_KT, group.mask_KT)
    check_finite("logprob", {group.position: kl_K.tolist()})
    shaped_K = group.scores_K - shaping.kl_penalty * kl_K
    return ScoredGroup(
        prompt_ids=group.prompt_ids,
        tokens_KT=group.tokens_KT,
        mask_KT=group.mask_KT,
        old_logp_KT=old_logp_KT,
        ref_logp_KT=group.ref_logp_KT,
        advantages_K=group_advantages(shaped_K[None], shaping.scale)[0],
    )


def score_under(
    actor: Stages,
    groups: Sequence[RatedGroup],
    shaping: Shaping,
    temperature: float,
    safe_point: SafePoint = never_stop,
) -> list[ScoredGroup]:
    """Take log-probs under the actor and score with them.

    Raises:
        NotFinite: a log-prob is not finite.
    """
    scored = []
    for g in groups:
        safe_point()
        prompt_1S = mx.array([g.prompt_ids])
        logp_KT = token_logps(actor, prompt_1S, g.tokens_KT, g.mask_KT, temperature)
        scored.append(score(g, logp_KT, shaping))
    return scored


def is_dead(group: ScoredGroup) -> bool:
    """Whether all advantages are zero: such a group would change nothing."""
    return not bool((group.advantages_K != 0).any().item())


def measure(
    groups: Sequence[Group], scored: Sequence[ScoredGroup], ranks: Ranks = ALONE
) -> Measures:
    """Figures of a scored rollout.

    Args:
        groups: those of this rank's share, as `scored`.
    """
    pairs = zip(groups, scored, strict=True)
    each = ranks.merged([(*_sums(s), _logp_gap(group, s.old_logp_KT)) for group, s in pairs])
    lengths, k1, k3, dead, gaps = zip(*each, strict=True)
    tokens = sum(lengths)
    return Measures(tokens, sum(k3) / tokens, sum(k1) / tokens, max(gaps), sum(dead))


def _sums(s: ScoredGroup) -> tuple[int, float, float, bool]:
    """(tokens, sum of k1, sum of k3, whether the group is dead)."""
    lengths_K = s.mask_KT.sum(axis=-1)
    k1 = (kl_k1(s.old_logp_KT, s.ref_logp_KT, s.mask_KT) * lengths_K).sum().item()
    k3 = kl_k3_sum(s.old_logp_KT, s.ref_logp_KT, s.mask_KT).item()
    return int(lengths_K.sum().item()), k1, k3, is_dead(s)


def _logp_gap(group: Group, old_KT: mx.array) -> float:
    recomputed = old_KT.tolist()
    return max(
        abs(sampled - again)
        for completion, row in zip(group.completions, recomputed, strict=True)
        # a row is padded on the right
        for sampled, again in zip(completion.logps, row, strict=False)
    )
