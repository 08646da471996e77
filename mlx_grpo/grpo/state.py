"""What an iteration changes besides adapter and optimizer: small, frozen, JSON."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_grpo.grpo.kl_controller import KLController
from mlx_grpo.rewards.normalizer import ScoreNormalizer


def improves(metric: str, value: float, before: float | None) -> bool:
    """Whether a figure of an evaluation is better than one before: a reward when it is higher, any
    other when it is lower; NaN and infinity never.

    Args:
        metric: as metrics.jsonl calls it.
    """
    if before is None or not math.isfinite(value):
        return math.isfinite(value)
    return value > before if metric.startswith("eval_reward") else value < before


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; None until one passes the gate."""

    step: int | None = None
    value: float | None = None
    """Of the metric that chooses."""

    def refusal(self, kl: float, value: float, gate: float, metric: str = "eval_perplexity") -> str:
        """Why a later evaluation is not the best one: the KL gate first, then the metric.

        Args:
            kl: of its policy to the reference, nats per token.
            value: of the metric.
            gate: the KL target at that time.
            metric: as metrics.jsonl calls it.

        Returns:
            The reason, or nothing if it is the best so far.
        """
        if not kl < gate:
            return f"KL above its gate of {gate:g}"
        better = improves(metric, value, self.value)
        return "" if better else f"{metric.removeprefix('eval_')} not better"


@dataclass(frozen=True)
class RunState:
    """State of a run between two iterations."""

    controller: KLController
    normalizer: ScoreNormalizer
    best: Best = field(default_factory=Best)
    iteration: int = 0
    """Iterations done."""
    tokens_seen: int = 0
    """Tokens of all completions so far, each with its prompt."""
    skipped_in_a_row: int = 0
    """Latest iterations that met a value that is not finite."""
    evaluated: int = -1
    """Iterations done at the last evaluation; -1 before the first."""
    peak: float | None = None
    """The best value of the metric that chooses, after any iteration and whatever the KL."""
    without_gain: int = 0
    """Latest evaluations in a row that did not pass it."""
    spreads: dict[str, float] = field(default_factory=dict)
    """Standard deviation of the normalised scores of each prompt's completions, by its id, when it
    was last visited."""

    def skipping(self, tokens: int) -> "RunState":
        """After an iteration that taught nothing: normaliser and controller stay as they are."""
        return replace(
            self,
            iteration=self.iteration + 1,
            tokens_seen=self.tokens_seen + tokens,
            skipped_in_a_row=self.skipped_in_a_row + 1,
        )

    def after_evaluation(self, metric: str, value: float, best: Best) -> "RunState":
        """After an evaluation of these iterations; that of the SFT model sets no peak."""
        state = replace(self, evaluated=self.iteration, best=best)
        if not self.iteration:
            return state
        if improves(metric, value, self.peak):
            return replace(state, peak=value, without_gain=0)
        return replace(state, without_gain=self.without_gain + 1)

    def to_json(self) -> dict[str, Any]:
        """For `state.json`; Python writes floats so that they read back as the same bits."""
        return {
            "iteration": self.iteration,
            "beta": self.controller.beta,
            "learning_rate": self.controller.learning_rate,
            "decay": self.controller.decay,
            "decay_sum": self.controller.decay_sum,
            "decay_aimed": self.controller.aimed,
            "normalizer": {"mean": self.normalizer.mean, "std": self.normalizer.std},
            "best": {"step": self.best.step, "value": self.best.value},
            "tokens_seen": self.tokens_seen,
            "skipped_in_a_row": self.skipped_in_a_row,
            "evaluated": self.evaluated,
            "peak": self.peak,
            "without_gain": self.without_gain,
            "spreads": self.spreads,
        }

    def with_json(self, saved: dict[str, Any]) -> "RunState":
        """This state with what `to_json` wrote; constants of controller and normaliser stay."""
        best = saved["best"]
        return RunState(
            controller=replace(
                self.controller,
                beta=saved["beta"],
                learning_rate=saved["learning_rate"],
                decay=saved.get("decay", 0.0),  # states from before there was one
                decay_sum=saved.get("decay_sum", 0.0),
                aimed=saved.get("decay_aimed", 0.0),
            ),
            normalizer=replace(self.normalizer, **saved["normalizer"]),
            # states from before there was a choice
            best=Best(best["step"], best.get("value", best.get("perplexity"))),
            iteration=saved["iteration"],
            tokens_seen=saved["tokens_seen"],
            skipped_in_a_row=saved["skipped_in_a_row"],
            evaluated=saved["evaluated"],
            peak=saved.get("peak"),
            without_gain=saved.get("without_gain", 0),
            spreads=saved.get("spreads", {}),
        )
