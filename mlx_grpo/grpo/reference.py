"""The KL of sampled completions to the reference, on all of them or on a share.

The KL is taken between the sampler's log-probs, which a rollout leaves behind, and the reference's.
Where it is only measured, a share of the completions tells it without bias; a penalty in the reward
needs it for each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_grpo.core.padding import completion_arrays, sampled_logps
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Completion, Group
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.kl_estimators import kl_k1, kl_k3_sum
from mlx_grpo.grpo.logprob import answer_logps, token_logps
from mlx_grpo.models.decoder import Decoder


@dataclass(frozen=True)
class GroupKL:
    """The KL of some completions of a group."""

    k1: dict[int, float]
    """Of each completion, by its place in the group: mean k1, nats per token."""
    k1_sum: float = 0.0
    """Over tokens."""
    k3_sum: float = 0.0
    """Over tokens."""
    tokens: int = 0


def measured_rows(seed: int, iteration: int, groups: int, k: int, count: int) -> list[list[int]]:
    """Which completions of each group the KL is measured on: `count` of all, drawn by key."""
    drawn = permutation(seed, "kl", iteration, n=groups * k)[:count]
    rows: list[list[int]] = [[] for _ in range(groups)]
    for place in sorted(drawn):
        rows[place // k].append(place % k)
    return rows


def kl_to_reference(
    groups: Sequence[Group],
    rows: Sequence[Sequence[int]],
    reference: Decoder,
    temperature: float,
    safe_point: SafePoint = never_stop,
    share: slice = slice(None),
) -> list[GroupKL]:
    """The KL of the given rows of each group of the share."""
    found = []
    for group, chosen in list(zip(groups, rows, strict=True))[share]:
        safe_point()
        completions = [group.completions[i] for i in chosen]
        if not completions:
            found.append(GroupKL({}))
            continue
        tokens_NT, mask_NT = completion_arrays(completions)
        prompt_1S = mx.array([group.prompt.token_ids])
        ref_NT = token_logps(reference, prompt_1S, tokens_NT, mask_NT, temperature)
        found.append(_group_kl(chosen, completions, ref_NT, mask_NT))
    return found


def kl_of_single_answers(
    groups: Sequence[Group],
    reference: Decoder,
    temperature: float,
    after_pass: Callable[[int], None] = lambda done: None,
) -> list[GroupKL]:
    """The KL of groups of one completion each, several groups to a pass.

    Args:
        after_pass: told how many groups are done.
    """
    asked = [(g.prompt.token_ids, g.completions[0].token_ids) for g in groups]
    ref = answer_logps(reference, asked, temperature, after_pass)
    return [
        _group_kl([0], g.completions, ref_T[None], completion_arrays(g.completions)[1])
        for g, ref_T in zip(groups, ref, strict=True)
    ]


def _group_kl(
    chosen: Sequence[int], completions: Sequence[Completion], ref_NT: mx.array, mask_NT: mx.array
) -> GroupKL:
    sampled_NT = sampled_logps(completions)
    k1_N = kl_k1(sampled_NT, ref_NT, mask_NT).tolist()
    lengths = [c.model_tokens for c in completions]
    return GroupKL(
        k1=dict(zip(chosen, k1_N, strict=True)),
        k1_sum=sum(kl * n for kl, n in zip(k1_N, lengths, strict=True)),
        k3_sum=kl_k3_sum(sampled_NT, ref_NT, mask_NT).item(),
        tokens=sum(lengths),
    )


def mean_kl(found: Sequence[GroupKL], ranks: Ranks = ALONE) -> tuple[float, float]:
    """(k3, k1) in nats per token over the groups of all ranks."""
    each = ranks.merged([(kl.k3_sum, kl.k1_sum, kl.tokens) for kl in found])
    k3, k1, tokens = map(sum, zip(*each, strict=True))
    return k3 / tokens, k1 / tokens
