"""The update: old log-probs, staged gradients of the clipped surrogate, and one AdamW step for each
minibatch, clipped by global norm and guarded against NaN and infinity."""

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
from mlx_grpo.grpo.advantages import Shaping, compute_advantages, is_dead
from mlx_grpo.grpo.logprob import logps_with_gradient, token_logps
from mlx_grpo.grpo.loss import Aggregation, Clip, LossInputs, clipped_surrogate, token_weights
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
    approx_kl: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0
    skips: list[Skip] = field(default_factory=list)
    """Minibatches left out because their loss or gradient was not finite."""
    stopped_early: bool = False


def update(
    actor: Decoder,
    optimizer: optim.AdamW,
    groups: Sequence[RewardedGroup],
    shaping: Shaping,
    settings: UpdateSettings,
    safe_point: SafePoint = never_stop,
    ranks: Ranks = ALONE,
) -> tuple[list[TrainingGroup], UpdateStats]:
    """All optimizer steps of one iteration, in the order the groups come in.

    Old log-probs are the actor's before its first step. They are computed beforehand, except for
    the first minibatch: there the forward pass of its own gradient gives the same numbers.

    Every minibatch counts all of its completions, those of dead groups too, so a group without a
    preference weighs as zero and does not make the others heavier. With several ranks each gives
    its own groups; minibatches are those of the whole batch, and all ranks take the same steps.

    Args:
        groups: this rank's share of the iteration.
        safe_point: called before each pass; it may stop the update halfway.

    Returns:
        This rank's groups with their advantages, and the sums over the minibatches.

    Raises:
        NotFinite: a log-prob is not finite; nothing has moved by then.
    """
    stats, sizes = UpdateStats(), ranks.merged([*map(_size, groups)])
    own_first = ranks.own(range(_reused(settings))).stop
    with ranks.failing_together():
        later = _advantages_beforehand(actor, groups[own_first:], shaping, settings, safe_point)
    training: list[TrainingGroup] = []
    for epoch in range(settings.epochs):
        for start in range(0, len(sizes), settings.minibatch_size):
            positions = range(len(sizes))[start : start + settings.minibatch_size]
            total = _MinibatchSum.over(positions, sizes, settings)
            if epoch == start == 0:
                with ranks.failing_together():
                    first = _first_minibatch(actor, total, groups[:own_first], shaping, safe_point)
                training = [*first, *later]
            if epoch or start or not own_first:
                _minibatch(actor, total, training[ranks.own(positions)], safe_point)
            total.join(ranks)
            if total.kl > settings.kl_stop * total.seen:
                total.note(stats)
                stats.stopped_early = True
                return training, stats
            _step(actor, optimizer, total, stats, ranks)
    return training, stats


def _reused(settings: UpdateSettings) -> int:
    """How many groups of an iteration need no old log-probs beforehand: the first minibatch's.

    A group in several passes does: its advantages need the log-probs of all its rows.
    """
    return 0 if settings.rows_per_pass else settings.minibatch_size


def _advantages_beforehand(
    actor: Decoder,
    groups: Sequence[RewardedGroup],
    shaping: Shaping,
    settings: UpdateSettings,
    safe_point: SafePoint,
) -> list[TrainingGroup]:
    training = []
    for g in groups:
        safe_point()
        prompt_1S = mx.array([g.prompt_ids])
        old_KT = token_logps(actor, prompt_1S, g.tokens_KT, g.mask_KT, settings.temperature)
        training.append(compute_advantages(g, old_KT, shaping))
    return training


def _size(group: RewardedGroup | TrainingGroup) -> tuple[int, int]:
    """(completions, tokens)."""
    return group.mask_KT.shape[0], int(group.mask_KT.sum().item())


def _first_minibatch(
    actor: Decoder,
    total: "_MinibatchSum",
    groups: Sequence[RewardedGroup],
    shaping: Shaping,
    safe_point: SafePoint,
) -> list[TrainingGroup]:
    """Forward, advantages, backward, group by group: the traces of one group at a time are held."""
    training = []
    for group in groups:
        safe_point()
        buckets = _buckets(group, 0)
        temperature = total.settings.temperature
        ahead = [forward_pass(actor, rows_of(group, b), temperature) for b in buckets]
        parts = [(rows, a.logp_KT) for rows, a in zip(buckets, ahead, strict=True)]
        old_logp_KT = joined(parts, group.mask_KT.shape)
        training.append(compute_advantages(group, old_logp_KT, shaping))
        for rows in [] if is_dead(training[-1]) else buckets:
            total.add(actor, rows_of(training[-1], rows), ahead.pop(0))
    return training


def _minibatch(
    actor: Decoder, total: "_MinibatchSum", groups: Sequence[TrainingGroup], safe_point: SafePoint
) -> None:
    """Forward and backward of the groups that are not dead."""
    for group in groups:
        for rows in [] if is_dead(group) else _buckets(group, total.settings.rows_per_pass):
            safe_point()
            part = rows_of(group, rows)
            total.add(actor, part, forward_pass(actor, part, total.settings.temperature))


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

    def add(self, actor: Decoder, part: TrainingGroup, ahead: "ForwardPass") -> None:
        """Run the backward of a pass and add what it gives."""
        s = self.settings
        weights_KT = token_weights(
            part.mask_KT, s.aggregation, self.completions, self.tokens, s.max_tokens
        )
        loss, metrics, self.gradients = backward_pass(
            actor, part, ahead, weights_KT, s.clip, self.gradients
        )
        self.loss += loss
        self.clipped += metrics["clipped"]
        self.kl += metrics["kl"]
        self.seen += int(metrics["tokens"])

    def note(self, stats: UpdateStats) -> None:
        """Add the figures to those of the iteration."""
        stats.tokens += self.seen
        stats.clipped += self.clipped
        stats.approx_kl += self.kl


@dataclass(frozen=True)
class ForwardPass:
    """What a forward leaves: all that a backward needs but the loss."""

    trace: backward.Trace
    logp_KT: mx.array
    dlogp_KTD: mx.array
    """Gradient of each log-prob with respect to the hidden state that predicts its token."""


def forward_pass(
    actor: Decoder, group: RewardedGroup | TrainingGroup, temperature: float
) -> ForwardPass:
    """Forward and head of a group, once."""
    trace = backward.forward(actor, mx.array([group.prompt_ids]), group.tokens_KT)
    hidden_KTD = shift_right(trace.h_prompt, trace.h_rows)
    logp_KT, dlogp_KTD = logps_with_gradient(
        actor, hidden_KTD, group.tokens_KT, group.mask_KT, temperature
    )
    return ForwardPass(trace, logp_KT, dlogp_KTD)


def backward_pass(
    actor: Decoder,
    group: TrainingGroup,
    ahead: ForwardPass,
    weights_KT: mx.array,
    clip: Clip,
    total: Parameters | None = None,
) -> tuple[float, dict[str, float], Parameters]:
    """Loss and metrics of a group's completions, and the gradient by adapter name, added to
    `total`; uses up `ahead`."""
    inputs = LossInputs(group.old_logp_KT, group.advantages_K, group.mask_KT, weights_KT)
    (loss, metrics), dloss_KT = mx.value_and_grad(clipped_surrogate)(ahead.logp_KT, inputs, clip)
    grad_KTD = (dloss_KT[..., None] * ahead.dlogp_KTD).astype(ahead.dlogp_KTD.dtype)
    g_prompt, g_rows = backward.unshift(grad_KTD, len(group.prompt_ids))
    gradients = backward.backward(actor, ahead.trace, g_prompt, g_rows, total)
    return loss.item(), {name: value.item() for name, value in metrics.items()}, gradients


def _step(
    actor: Decoder,
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
    current = lora_parameters(actor.model)
    gradients = total.gradients or {n: mx.zeros_like(v) for n, v in current.items()}
    max_norm = total.settings.max_grad_norm
    updated, norm = adamw_step(optimizer, ranks.sum(gradients), current, max_norm)
    if not math.isfinite(norm):
        stats.skips.append(Skip("gradient", total.positions, (norm,)))
        return
    set_parameters(actor.model, updated)
    stats.loss += total.loss
    stats.grad_norm += norm
    stats.steps += 1
