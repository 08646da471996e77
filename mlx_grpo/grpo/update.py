"""The update: staged gradients of the clipped surrogate, clipped by global norm, guarded, and one
AdamW step a minibatch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.optimizers as optim

from mlx_grpo.core.finite import Skip
from mlx_grpo.core.padding import joined, length_buckets, row_lengths, rows_of
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Parameters, RewardedGroup, TrainingGroup
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.advantages import Shaping, is_dead, score
from mlx_grpo.grpo.kl_estimators import kl_k3_sum
from mlx_grpo.grpo.logprob import logps_with_gradient
from mlx_grpo.grpo.loss import Aggregation, Clip, clipped_count, clipped_surrogate, token_weights
from mlx_grpo.models import backward
from mlx_grpo.models.decoder import Decoder, shift_right
from mlx_grpo.models.lora import lora_parameters, set_parameters
from mlx_grpo.models.optimizer import adamw_step


@dataclass(frozen=True)
class UpdateSettings:
    """Constants of the update."""

    clip: Clip
    aggregation: Aggregation
    temperature: float
    max_tokens: int
    max_grad_norm: float
    minibatch_size: int
    epochs: int
    kl_stop: float
    """Skip the rest of an iteration's minibatches once the mean k3 between old and current policy
    passes this."""
    rows_per_pass: int = 0
    """Completions per forward and backward pass; 0 means the whole group."""


@dataclass
class UpdateStats:
    """Sums over the minibatches of an iteration."""

    loss: float = 0.0
    tokens: int = 0
    clipped: float = 0.0
    ratios: int = 0
    """Those that the clip could have silenced: tokens, or completions, of dead groups too."""
    approx_kl: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0
    skips: list[Skip] = field(default_factory=list)
    """Minibatches left out because their loss or gradient was not finite."""
    stopped_early: bool = False


def reused_groups(settings: UpdateSettings) -> int:
    """How many groups of an iteration need no old log-probs beforehand: the first minibatch's.

    There the actor has not moved yet: the first forward of the update gives the old log-probs, the
    same numbers. A group in several passes is scored before; its advantages need all of its rows.
    """
    return 0 if settings.rows_per_pass else settings.minibatch_size


def update(
    decoder: Decoder,
    optimizer: optim.AdamW,
    first: Sequence[RewardedGroup],
    later: Sequence[TrainingGroup],
    shaping: Shaping,
    settings: UpdateSettings,
    safe_point: SafePoint = never_stop,
    ranks: Ranks = ALONE,
) -> tuple[list[TrainingGroup], UpdateStats]:
    """All optimizer steps of one iteration, in the order the groups come in.

    Every minibatch counts all of its completions, those of dead groups too, so a group without a
    preference weighs as zero and does not make the others heavier. With several ranks each gives
    its own groups; minibatches are those of the whole batch, and all ranks take the same steps.

    Args:
        first: the first minibatch, scored on the way (see `reused_groups`), or nothing.
        later: the groups after it.
        safe_point: called before each pass; it may stop the update halfway.

    Returns:
        This rank's groups, scored, and the sums over the minibatches.

    Raises:
        NotFinite: a log-prob of the first minibatch is not finite; nothing has moved by then.
    """
    stats = UpdateStats()
    sizes = ranks.merged([*map(_size, first), *map(_size, later)])
    groups: list[TrainingGroup] = list(later)
    for epoch in range(settings.epochs):
        for start in range(0, len(sizes), settings.minibatch_size):
            positions = range(len(sizes))[start : start + settings.minibatch_size]
            total = _MinibatchSum.over(positions, sizes, settings)
            if epoch == start == 0:
                with ranks.failing_together():
                    scored = _first_minibatch(decoder, total, first, shaping, safe_point)
                    groups = [*scored, *later]
            if epoch or start or not first:
                _minibatch(decoder, total, groups[ranks.own(positions)], safe_point)
            total.join(ranks)
            if total.kl > settings.kl_stop * total.seen:
                total.note(stats)
                stats.stopped_early = True
                return groups, stats
            _step(decoder, optimizer, total, stats, ranks)
    return groups, stats


def _size(group: RewardedGroup | TrainingGroup) -> tuple[int, int]:
    """(completions, tokens)."""
    return group.mask_KT.shape[0], int(group.mask_KT.sum().item())


def _first_minibatch(
    decoder: Decoder,
    total: "_MinibatchSum",
    groups: Sequence[RewardedGroup],
    shaping: Shaping,
    safe_point: SafePoint,
) -> list[TrainingGroup]:
    """Forward, score, backward, group by group: the traces of one group at a time are held."""
    scored = []
    for group in groups:
        safe_point()
        buckets = _buckets(group, 0)
        temperature = total.settings.temperature
        ahead = [forward_pass(decoder, rows_of(group, b), temperature) for b in buckets]
        parts = [(rows, a.logp_KT) for rows, a in zip(buckets, ahead, strict=True)]
        scored.append(score(group, joined(parts, group.mask_KT.shape), shaping))
        for rows in [] if is_dead(scored[-1]) else buckets:
            total.add(decoder, rows_of(scored[-1], rows), ahead.pop(0))
    return scored


def _minibatch(
    decoder: Decoder, total: "_MinibatchSum", groups: Sequence[TrainingGroup], safe_point: SafePoint
) -> None:
    """Forward and backward of the groups that are not dead."""
    for group in groups:
        for rows in [] if is_dead(group) else _buckets(group, total.settings.rows_per_pass):
            safe_point()
            part = rows_of(group, rows)
            total.add(decoder, part, forward_pass(decoder, part, total.settings.temperature))


def _buckets(group: RewardedGroup | TrainingGroup, rows: int) -> list[list[int]]:
    return length_buckets(row_lengths(group.mask_KT), len(group.prompt_ids), rows)


@dataclass
class _MinibatchSum:
    """Gradient and figures of one minibatch, summed over its passes."""

    settings: UpdateSettings
    positions: tuple[int, ...]
    """Which of the iteration's groups."""
    completions: int
    tokens: int
    gradients: Parameters = field(default_factory=dict)
    loss: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    seen: int = 0
    live: int = 0
    """Ranks with a gradient."""

    @classmethod
    def over(
        cls, positions: range, sizes: Sequence[tuple[int, int]], settings: UpdateSettings
    ) -> "_MinibatchSum":
        completions, tokens = (sum(s) for s in zip(*(sizes[p] for p in positions), strict=True))
        return cls(settings, tuple(positions), completions, tokens)

    def join(self, ranks: Ranks) -> None:
        """Sum the figures over the ranks; the gradient is left to the step."""
        mine = (self.loss, self.clipped, self.kl, self.seen, bool(self.gradients))
        whole = zip(*ranks.gather(mine), strict=True)
        self.loss, self.clipped, self.kl, self.seen, self.live = map(sum, whole)

    def add(self, decoder: Decoder, part: TrainingGroup, ahead: "ForwardPass") -> None:
        """Run the backward of a pass and add what it gives."""
        s = self.settings
        weights_KT = token_weights(
            part.mask_KT, s.aggregation, self.completions, self.tokens, s.max_tokens
        )
        arguments = (ahead.logp_KT, part.old_logp_KT, part.advantages_K, part.mask_KT)
        self.loss += clipped_surrogate(*arguments, weights_KT, s.clip).item()
        self.clipped += clipped_count(*arguments, s.clip).item()
        self.kl += kl_k3_sum(ahead.logp_KT, part.old_logp_KT, part.mask_KT).item()
        self.seen += int(part.mask_KT.sum().item())
        self.gradients = backward_pass(decoder, part, ahead, weights_KT, s.clip, self.gradients)

    def note(self, stats: UpdateStats) -> None:
        """Add the figures to those of the iteration."""
        stats.tokens += self.seen
        stats.clipped += self.clipped
        token_level = self.settings.clip.level == "token"
        stats.ratios += self.tokens if token_level else self.completions
        stats.approx_kl += self.kl


@dataclass(frozen=True)
class ForwardPass:
    """What a forward leaves: all that a backward needs but the loss."""

    trace: backward.Trace
    logp_KT: mx.array
    dlogp_KTD: mx.array
    """Gradient of each log-prob with respect to the hidden state that predicts its token."""


def forward_pass(
    decoder: Decoder, group: RewardedGroup | TrainingGroup, temperature: float
) -> ForwardPass:
    """Forward and head of a group, once."""
    trace = backward.forward(decoder, mx.array([group.prompt_ids]), group.tokens_KT)
    hidden_KTD = shift_right(trace.h_prompt, trace.h_rows)
    logp_KT, dlogp_KTD = logps_with_gradient(
        decoder, hidden_KTD, group.tokens_KT, group.mask_KT, temperature
    )
    return ForwardPass(trace, logp_KT, dlogp_KTD)


def backward_pass(
    decoder: Decoder,
    group: TrainingGroup,
    ahead: ForwardPass,
    weights_KT: mx.array,
    clip: Clip,
    total: Parameters | None = None,
) -> Parameters:
    """Gradient of a group's weighted clipped surrogate by adapter name, added to `total`; uses up
    `ahead`."""
    fixed = (group.old_logp_KT, group.advantages_K, group.mask_KT, weights_KT, clip)
    dloss_KT = mx.grad(lambda logp_KT: clipped_surrogate(logp_KT, *fixed))(ahead.logp_KT)
    grad_KTD = (dloss_KT[..., None] * ahead.dlogp_KTD).astype(ahead.dlogp_KTD.dtype)
    g_prompt, g_rows = backward.unshift(grad_KTD, len(group.prompt_ids))
    return backward.backward(decoder, ahead.trace, g_prompt, g_rows, total)


def _step(
    decoder: Decoder,
    optimizer: optim.AdamW,
    total: _MinibatchSum,
    stats: UpdateStats,
    ranks: Ranks,
) -> None:
    """One optimizer step, or none where loss or gradient is not finite."""
    total.note(stats)
    if not total.live:
        return
    if not math.isfinite(total.loss):
        stats.skips.append(Skip("loss", total.positions, (total.loss,)))
        return
    current = lora_parameters(decoder.model)
    gradients = total.gradients or {n: mx.zeros_like(v) for n, v in current.items()}
    max_norm = total.settings.max_grad_norm
    updated, norm = adamw_step(optimizer, ranks.sum(gradients), current, max_norm)
    if not math.isfinite(norm):
        stats.skips.append(Skip("gradient", total.positions, (norm,)))
        return
    set_parameters(decoder.model, updated)
    stats.loss += total.loss
    stats.grad_norm += norm
    stats.steps += 1
