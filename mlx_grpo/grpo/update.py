"""The update: gradients of the clipped surrogate, and one AdamW step for each minibatch, clipped by
global norm and guarded against NaN and infinity.

Old log-probs are the actor's before its first step. They are computed beforehand, except for the
first minibatch: there the forward pass of its own gradient gives the same numbers.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.optimizers as optim

from mlx_grpo.core.finite import Skip, check_finite
from mlx_grpo.core.padding import joined, length_buckets, row_lengths, rows_of
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Parameters, TrainingGroup
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.advantages import is_dead
from mlx_grpo.grpo.logprob import logps_with_gradient, token_logps
from mlx_grpo.grpo.loss import Aggregation, Clip, LossInputs, clipped_surrogate, token_weights
from mlx_grpo.models.backward import Pass, States, gradients
from mlx_grpo.models.decoder import Decoder, shift_right, unshift
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
    logp_gap: float = 0.0
    """Largest difference between a log-prob at rollout time and the recomputed one."""
    mean_logp_gap: float = 0.0
    """Its mean over the tokens."""


def update(
    actor: Decoder,
    optimizer: optim.AdamW,
    groups: Sequence[TrainingGroup],
    settings: UpdateSettings,
    safe_point: SafePoint = never_stop,
    ranks: Ranks = ALONE,
) -> UpdateStats:
    """All optimizer steps of one iteration, in the order the groups come in.

    Every minibatch counts all of its completions, those of dead groups too, so a group without a
    preference weighs as zero and does not make the others heavier. With several ranks each gives
    its own groups; minibatches are those of the whole batch, and all ranks take the same steps.

    Args:
        groups: this rank's share of the iteration.
        safe_point: called before each pass; it may stop the update halfway.

    Raises:
        NotFinite: a log-prob is not finite; nothing has moved by then.
    """
    stats, sizes = UpdateStats(), ranks.merged([*map(_size, groups)])
    live = [not is_dead(group) for group in groups]
    own_first = ranks.own(range(_reused(settings))).stop
    with ranks.failing_together():
        old = [
            _old_logps(actor, g, settings, safe_point) if live[i] and i >= own_first else None
            for i, g in enumerate(groups)
        ]
    for epoch in range(settings.epochs):
        for start in range(0, len(sizes), settings.minibatch_size):
            positions = range(len(sizes))[start : start + settings.minibatch_size]
            total = _MinibatchSum.over(positions, sizes, settings)
            first = epoch == start == 0
            with ranks.failing_together() if first else nullcontext():
                for i in range(len(groups))[ranks.own(positions)]:
                    if live[i]:
                        old[i] = total.add(actor, groups[i], old[i], safe_point)
            if first:
                _note_gaps(stats, ranks.gather(_logp_gaps(groups, old)))
            total.join(ranks)
            if total.kl > settings.kl_stop * total.seen:
                total.note(stats)
                stats.stopped_early = True
                return stats
            _step(actor, optimizer, total, stats, ranks)
    return stats


def _size(group: TrainingGroup) -> tuple[int, int]:
    """(completions, tokens) that a mean counts."""
    return group.mask_KT.shape[0] + group.left_out, int(group.mask_KT.sum().item())


def _reused(settings: UpdateSettings) -> int:
    """How many groups of an iteration need no old log-probs beforehand: the first minibatch's. In
    several passes the old log-probs of a group would not all be there when its first one steps."""
    return 0 if settings.rows_per_pass else settings.minibatch_size


def _old_logps(
    actor: Decoder, group: TrainingGroup, settings: UpdateSettings, safe_point: SafePoint
) -> mx.array:
    safe_point()
    prompt_1S = mx.array([group.prompt_ids])
    logp_KT = token_logps(actor, prompt_1S, group.tokens_KT, group.mask_KT, settings.temperature)
    _check(group, logp_KT)
    return logp_KT


def _check(group: TrainingGroup, logp_KT: mx.array) -> None:
    check_finite("logprob", {group.position: logp_KT.sum(axis=-1).tolist()})


def _logp_gaps(
    groups: Sequence[TrainingGroup], old: Sequence[mx.array | None]
) -> tuple[float, float, int]:
    """Largest and summed difference between sampled and recomputed log-probs, and of how many."""
    most, total, count = 0.0, 0.0, 0
    for g, logp_KT in zip(groups, old, strict=True):
        if logp_KT is not None:
            gap_KT = mx.abs((g.sampled_logp_KT - logp_KT) * g.mask_KT)
            most = max(most, gap_KT.max().item())
            total += gap_KT.sum().item()
            count += int(g.mask_KT.sum().item())
    return most, total, count


def _note_gaps(stats: UpdateStats, found: Sequence[tuple[float, float, int]]) -> None:
    most, total, count = zip(*found, strict=True)
    stats.logp_gap, stats.mean_logp_gap = max(most), sum(total) / max(sum(count), 1)


def surrogate_gradients(
    actor: Decoder,
    parts: Sequence[TrainingGroup],
    old: Sequence[mx.array | None],
    weights: Sequence[mx.array],
    settings: UpdateSettings,
    total: Parameters | None = None,
) -> tuple[float, dict[str, float], list[mx.array], Parameters]:
    """The loss of some completions of one group, and its gradient.

    Args:
        parts: completions of similar length; a forward and backward pass each.
        old: their old log-probs; None where they are those of this very forward pass.
        weights: of their tokens in the loss, see `token_weights`.
        total: gradients to which these are added.

    Returns:
        (loss, summed metrics of the loss, log-probs [K, T] of each part, gradients by name).
    """
    losses, metrics, logps = [], dict[str, float](), []

    def cotangents(states: list[States]) -> list[States]:
        found = []
        for part, old_KT, weights_KT, (h_prompt, h_rows) in zip(
            parts, old, weights, states, strict=True
        ):
            hidden_KTD = shift_right(h_prompt, h_rows)
            logp_KT, dlogp_KTD = logps_with_gradient(
                actor, hidden_KTD, part.tokens_KT, part.mask_KT, settings.temperature
            )
            logps.append(logp_KT)
            before_KT = logp_KT if old_KT is None else old_KT
            inputs = LossInputs(before_KT, part.advantages_K, part.mask_KT, weights_KT)
            (loss, sums), dloss_KT = mx.value_and_grad(clipped_surrogate)(
                logp_KT, inputs, settings.clip
            )
            losses.append(loss.item())
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
            grad_KTD = dloss_KT[..., None] * dlogp_KTD
            found.append(unshift(grad_KTD, len(part.prompt_ids)))
        mx.eval(found)
        return found

    passes = [Pass(mx.array([p.prompt_ids]), p.tokens_KT) for p in parts]
    total = gradients(actor, passes, cotangents, total)
    return sum(losses), metrics, logps, total


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

    def add(
        self, actor: Decoder, group: TrainingGroup, old_KT: mx.array | None, safe_point: SafePoint
    ) -> mx.array:
        """Add the gradient and figures of a group; returns its old log-probs."""
        rows = self.settings.rows_per_pass
        buckets = length_buckets(row_lengths(group.mask_KT), len(group.prompt_ids), rows)
        found: list[tuple[list[int], mx.array]] = []
        for together in [[b] for b in buckets] if rows else [buckets]:
            safe_point()
            parts = [rows_of(group, b) for b in together]
            old = [_rows(old_KT, b, p) for b, p in zip(together, parts, strict=True)]
            logps = self._add(actor, parts, old)
            found += zip(together, logps, strict=True)
        if old_KT is not None:
            return old_KT
        logp_KT = joined(found, group.mask_KT.shape)
        _check(group, logp_KT)
        return logp_KT

    def _add(
        self, actor: Decoder, parts: Sequence[TrainingGroup], old: Sequence[mx.array | None]
    ) -> list[mx.array]:
        s = self.settings
        weights = [
            token_weights(p.mask_KT, s.aggregation, self.completions, self.tokens, s.max_tokens)
            for p in parts
        ]
        loss, metrics, logps, self.gradients = surrogate_gradients(
            actor, parts, old, weights, s, self.gradients
        )
        self.loss += loss
        self.clipped += metrics["clipped"]
        self.kl += metrics["kl"]
        self.seen += int(metrics["tokens"])
        return logps

    def join(self, ranks: Ranks) -> None:
        """Sum the figures over the ranks; the gradient is left to the step."""
        mine = (self.loss, self.clipped, self.kl, self.seen, bool(self.gradients))
        whole = zip(*ranks.gather(mine), strict=True)
        self.loss, self.clipped, self.kl, self.seen, self.live = map(sum, whole)

    def note(self, stats: UpdateStats) -> None:
        """Add the figures to those of the iteration."""
        stats.tokens += self.seen
        stats.clipped += self.clipped
        token_level = self.settings.clip.level == "token"
        stats.ratios += self.tokens if token_level else self.completions
        stats.approx_kl += self.kl


def _rows(values_KT: mx.array | None, rows: Sequence[int], part: TrainingGroup) -> mx.array | None:
    """Those of a part of a group, cut to its longest row."""
    return None if values_KT is None else values_KT[mx.array(rows), : part.mask_KT.shape[1]]


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
    own = total.gradients or {n: mx.zeros_like(v) for n, v in current.items()}
    max_norm = total.settings.max_grad_norm
    updated, norm = adamw_step(optimizer, ranks.sum(own), current, max_norm)
    if not math.isfinite(norm):
        stats.skips.append(Skip("gradient", total.positions, (norm,)))
        return
    set_parameters(actor.model, updated)
    stats.loss += total.loss
    stats.grad_norm += norm
    stats.steps += 1
