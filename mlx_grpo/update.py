"""The update: staged gradients of the clipped surrogate, clipped by global norm, guarded, and one
AdamW step a minibatch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.grpo import (
    Aggregation,
    Clip,
    clipped_surrogate,
    clipped_tokens,
    kl_k3_sum,
    token_weights,
)
from mlx_grpo.guard import Skip
from mlx_grpo.logprob import head_gradient, hidden_logps
from mlx_grpo.models import backward
from mlx_grpo.models.lora import Parameters, lora_parameters, set_parameters
from mlx_grpo.models.stages import Stages, shift_right
from mlx_grpo.stopping import SafePoint, never_stop
from mlx_grpo.types import ScoredGroup


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


def new_optimizer(learning_rate: float, weight_decay: float) -> optim.AdamW:
    """AdamW (arXiv:1711.05101) with bias correction, which MLX leaves out unless told."""
    return optim.AdamW(learning_rate=learning_rate, weight_decay=weight_decay, bias_correction=True)


def live_groups(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups whose advantages are not all zero; the others would change nothing."""
    return [g for g in groups if bool((g.advantages_K != 0).any().item())]


def update(
    stages: Stages,
    optimizer: optim.AdamW,
    groups: Sequence[ScoredGroup],
    settings: UpdateSettings,
    safe_point: SafePoint = never_stop,
) -> UpdateStats:
    """All optimizer steps of one iteration, in the order the groups come in.

    Every minibatch counts all of its completions, those of dead groups too, so a group without a
    preference weighs as zero and does not make the others heavier.

    Args:
        safe_point: called before each pass; it may stop the update halfway.
    """
    stats = UpdateStats()
    size = settings.minibatch_size
    for _ in range(settings.epochs):
        for start in range(0, len(groups), size):
            minibatch = groups[start : start + size]
            if not live_groups(minibatch):
                continue
            gradients, loss, approx_kl = _minibatch_gradients(
                stages, minibatch, settings, stats, safe_point
            )
            if approx_kl > settings.kl_stop:
                stats.stopped_early = True
                return stats
            positions = tuple(range(start, start + len(minibatch)))
            _step(stages, optimizer, gradients, loss, settings, stats, positions)
    return stats


def _minibatch_gradients(
    stages: Stages,
    minibatch: Sequence[ScoredGroup],
    settings: UpdateSettings,
    stats: UpdateStats,
    safe_point: SafePoint,
) -> tuple[Parameters, float, float]:
    completions = sum(g.tokens_KT.shape[0] for g in minibatch)
    tokens = int(sum(g.mask_KT.sum().item() for g in minibatch))
    total: Parameters = {}
    loss = kl = seen = 0.0
    for group in live_groups(minibatch):
        weights_KT = token_weights(
            group.mask_KT, settings.aggregation, completions, tokens, settings.max_tokens
        )
        for part, weights in _passes(group, weights_KT, settings.rows_per_pass):
            safe_point()
            gradients, logp_KT = group_gradients(
                stages, part, weights, settings.clip, settings.temperature
            )
            arguments = (logp_KT, part.old_logp_KT, part.advantages_K, part.mask_KT)
            loss += clipped_surrogate(*arguments, weights, settings.clip).item()
            stats.clipped += clipped_tokens(*arguments, settings.clip).item()
            kl += kl_k3_sum(logp_KT, part.old_logp_KT, part.mask_KT).item()
            seen += part.mask_KT.sum().item()
            total = {n: total[n] + g for n, g in gradients.items()} if total else gradients
            mx.eval(total)
    stats.tokens += int(seen)
    stats.approx_kl += kl
    return total, loss, kl / seen


def _passes(
    group: ScoredGroup, weights_KT: mx.array, rows: int
) -> list[tuple[ScoredGroup, mx.array]]:
    """Cut a group into passes of at most `rows` completions of similar length."""
    lengths = np.asarray(group.mask_KT).sum(axis=-1).astype(int)
    by_length = np.argsort(-lengths, kind="stable")
    width = rows or len(by_length)
    passes = []
    for start in range(0, len(by_length), width):
        chosen = by_length[start : start + width]
        index, longest = mx.array(chosen), int(lengths[chosen].max())
        part = ScoredGroup(
            prompt_ids=group.prompt_ids,
            tokens_KT=group.tokens_KT[index, :longest],
            mask_KT=group.mask_KT[index, :longest],
            old_logp_KT=group.old_logp_KT[index, :longest],
            ref_logp_KT=group.ref_logp_KT[index, :longest],
            advantages_K=group.advantages_K[index],
        )
        passes.append((part, weights_KT[index, :longest]))
    return passes


def group_gradients(
    stages: Stages, group: ScoredGroup, weights_KT: mx.array, clip: Clip, temperature: float
) -> tuple[Parameters, mx.array]:
    """Gradient of one group's weighted clipped surrogate by adapter name, and log-probs [K, T]."""
    trace = backward.forward(stages, mx.array([group.prompt_ids]), group.tokens_KT)
    hidden_KTD = shift_right(trace.h_prompt, trace.h_rows)
    old_N, weights_N = group.old_logp_KT.reshape(-1), weights_KT.reshape(-1)
    advantages_N = mx.broadcast_to(group.advantages_K[:, None], group.mask_KT.shape).reshape(-1)

    def token_cotangent(logp_N: mx.array, where_N: mx.array) -> mx.array:
        # every token is its own row of length one: the surrogate is a sum over tokens
        column = (
            old_N[where_N, None],
            advantages_N[where_N],
            mx.ones((where_N.size, 1)),
            weights_N[where_N, None],
        )
        return mx.grad(lambda logp: clipped_surrogate(logp[:, None], *column, clip))(logp_N)

    cotangent = token_cotangent
    if clip.level == "sequence":
        # the ratio needs the whole completion: log-probs first, then the gradient of the small loss
        logp_KT = hidden_logps(stages, hidden_KTD, group.tokens_KT, group.mask_KT, temperature)
        fixed = (group.old_logp_KT, group.advantages_K, group.mask_KT, weights_KT, clip)
        whole_N = mx.grad(lambda logp: clipped_surrogate(logp, *fixed))(logp_KT).reshape(-1)

        def cotangent(logp_N: mx.array, where_N: mx.array) -> mx.array:
            return whole_N[where_N]

    grad_KTD, logp_KT = head_gradient(
        stages, hidden_KTD, group.tokens_KT, group.mask_KT, temperature, cotangent
    )
    g_prompt, g_rows = backward.unshift(grad_KTD, len(group.prompt_ids))
    return backward.backward(stages, trace, g_prompt, g_rows), logp_KT


def adamw_step(
    optimizer: optim.AdamW, gradients: Parameters, parameters: Parameters, max_norm: float
) -> tuple[Parameters, float]:
    """Clip the gradient to a global norm and step: (new parameters, norm before clipping).

    A norm that is not finite returns the parameters as they were and leaves the optimizer alone.
    """
    squares = mx.stack([mx.square(g.astype(mx.float32)).sum() for g in gradients.values()])
    norm = float(mx.sqrt(squares.sum()).item())
    if not math.isfinite(norm):
        return parameters, norm
    factor = min(1.0, max_norm / (norm + 1e-6))
    scaled = tree_unflatten([(name, g * factor) for name, g in gradients.items()])
    # nested trees, so that the optimizer's state survives flattening into a file and back
    updated = optimizer.apply_gradients(scaled, tree_unflatten(list(parameters.items())))
    mx.eval(updated, optimizer.state)
    return dict(tree_flatten(updated)), norm


def _step(
    stages: Stages,
    optimizer: optim.AdamW,
    gradients: Parameters,
    loss: float,
    settings: UpdateSettings,
    stats: UpdateStats,
    positions: tuple[int, ...],
) -> None:
    """One optimizer step, or none where loss or gradient is not finite."""
    current = lora_parameters(stages.model)
    if not math.isfinite(loss):
        stats.skips.append(Skip("loss", positions, (loss,)))
        return
    updated, norm = adamw_step(optimizer, gradients, current, settings.max_grad_norm)
    if not math.isfinite(norm):
        stats.skips.append(Skip("gradient", positions, (norm,)))
        return
    set_parameters(stages.model, updated)
    stats.loss += loss
    stats.grad_norm += norm
    stats.steps += 1
