"""The figures of an iteration. A name that TRL has means what it means there (trl 1.16, computed
in `grpo_trainer.py`); what differs has a name of its own.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import mlx.core as mx

from mlx_grpo.backend.device import cached_memory, peak_memory
from mlx_grpo.core.finite import Skip
from mlx_grpo.core.stats import repetition, source_means
from mlx_grpo.core.types import Completion, Group
from mlx_grpo.grpo.state import RunState
from mlx_grpo.grpo.update import UpdateStats


class Clock:
    """Seconds and peak memory of each stage of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.cached = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as stage `name`."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peaks[name] = peak_memory()
        self.cached = max(self.cached, cached_memory())
        mx.clear_cache()  # the next stage asks for other sizes; unused buffers would pile up

    def metrics(self) -> dict[str, float]:
        """Seconds of each stage under `time/`, bytes under `memory/`; `cache` is the most that was
        kept for later at the end of a stage."""
        return {
            **{f"time/{name}": seconds for name, seconds in self.seconds.items()},
            **{f"memory/{name}": peak for name, peak in self.peaks.items()},
            "memory/cache": self.cached,
        }

    def iteration_metrics(self, sampled_tokens: int, updated_tokens: int) -> dict[str, float]:
        """`metrics`, and what follows from them for a whole iteration.

        Args:
            updated_tokens: those that went through the update, once per epoch.
        """
        total = sum(self.seconds.values())
        return {
            **self.metrics(),
            "time/iteration": total,
            "time/tokens_per_second": sampled_tokens / self.seconds["rollout"],
            "time/update_tokens_per_second": updated_tokens / self.seconds["update"],
            "memory/peak": max(self.peaks.values()),
        }


def iteration_metrics(
    state: RunState,
    groups: Sequence[Group],
    raw_PK: Sequence[Sequence[float]],
    by_source: dict[str, list[float | None]],
    kl: tuple[float, float],
    dead_groups: int,
    stats: UpdateStats,
    target: float,
) -> dict[str, Any]:
    """One row of metrics.jsonl, without times; `state` is the one the iteration ran with.

    Args:
        kl: mean k3 and k1 to the reference, nats per token.
        dead_groups: whose advantages are all zero.
    """
    completions = [c for g in groups for c in g.completions]
    lengths = [c.model_tokens for c in completions]
    rewards_PK = mx.array(raw_PK)
    steps, seen = max(stats.steps, 1), max(stats.tokens, 1)
    return {
        "step": state.iteration + 1,
        "reward": rewards_PK.mean().item(),
        "reward_std": mx.std(rewards_PK, ddof=1).item(),
        "reward_std_within_groups": mx.std(rewards_PK, axis=1, ddof=1).mean().item(),
        **source_means(by_source, "rewards"),
        "frac_reward_zero_std": sum(len(set(row)) == 1 for row in raw_PK) / len(groups),
        "frac_dead_groups": dead_groups / len(groups),
        "loss": stats.loss / steps,
        "grad_norm": stats.grad_norm / steps,
        "clip_ratio/region_mean": stats.clipped / max(stats.ratios, 1),
        "policy/approx_kl": stats.approx_kl / seen,
        "policy/optimizer_steps": stats.steps,
        "policy/stopped_early": stats.stopped_early,
        "policy/skipped_nonfinite": len(stats.skips),
        "learning_rate": state.controller.learning_rate,
        "kl": kl[0],
        "kl/k1": kl[1],
        "kl/target": target,
        "kl/beta": state.controller.penalty,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(c.finish_reason == "length" for c in completions)
        / len(completions),
        "completions/repetition": fmean(repetition(c.token_ids) for c in completions),
        **tool_metrics(completions),
        "sampling/sampling_logp_difference/max": stats.logp_gap,
        "sampling/sampling_logp_difference/mean": stats.mean_logp_gap,
        "prompts/visited": len(state.spreads),
        "normalizer/mean": state.normalizer.mean,
        "normalizer/std": state.normalizer.std,
        "num_tokens": state.tokens_seen + processed_tokens(groups),
    }


def tool_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Turns and tool calls per completion, and tokens of observations; nothing without an
    environment. `tools/failure_frequency` is the share of the calls that failed."""
    if not any(c.turns for c in completions):
        return {}
    count, calls = len(completions), sum(c.calls for c in completions)
    turns = sum(m["role"] == "assistant" for c in completions for m in c.turns)
    return {
        "tools/call_frequency": calls / count,
        "tools/failure_frequency": sum(c.failures for c in completions) / max(calls, 1),
        "completions/mean_turns": turns / count,
        "completions/mean_tool_tokens": sum(len(c.token_ids) - c.model_tokens for c in completions)
        / count,
    }


def skipped_metrics(
    state: RunState, groups: Sequence[Group], skip: Skip, clock: Clock
) -> dict[str, Any]:
    """The row of an iteration that ended before its update; `state` is the one it ran with."""
    return {
        "step": state.iteration + 1,
        "skipped": skip.stage,
        "num_tokens": state.tokens_seen + processed_tokens(groups),
        **clock.metrics(),
    }


def sampled_tokens(groups: Sequence[Group]) -> int:
    """Completion tokens of a rollout."""
    return sum(len(c.token_ids) for g in groups for c in g.completions)


def processed_tokens(groups: Sequence[Group]) -> int:
    """Tokens of a rollout's completions, each with its prompt."""
    return sum(len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions)
