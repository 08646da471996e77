"""What an iteration changes besides adapter and optimizer: small, frozen, JSON."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_grpo.grpo.kl_controller import KLController
from mlx_grpo.rewards.normalizer import ScoreNormalizer


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; `step` is None until one passes the gate."""

    step: int | None = None
    perplexity: float = math.inf

    def refusal(self, kl: float, perplexity: float, gate: float) -> str:
        """Why a later evaluation is not the best one: the KL gate first, then the perplexity.

        Args:
            kl: of its policy to the reference, nats per token.
            gate: the KL target at that time.

        Returns:
            The reason, or nothing if it is the best so far.
        """
        if not kl < gate:
            return f"KL above its gate of {gate:g}"
        return "" if perplexity < self.perplexity else "perplexity not better"


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

    def to_json(self) -> dict[str, Any]:
        """For `state.json`; Python writes floats so that they read back as the same bits."""
        finite = math.isfinite(self.best.perplexity)
        return {
            "iteration": self.iteration,
            "beta": self.controller.beta,
            "learning_rate": self.controller.learning_rate,
            "decay": self.controller.decay,
            "decay_sum": self.controller.decay_sum,
            "decay_aimed": self.controller.aimed,
            "normalizer": {"mean": self.normalizer.mean, "std": self.normalizer.std},
            "best": {
                "step": self.best.step,
                "perplexity": self.best.perplexity if finite else None,
            },
            "tokens_seen": self.tokens_seen,
            "skipped_in_a_row": self.skipped_in_a_row,
            "evaluated": self.evaluated,
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
            best=Best() if best["step"] is None else Best(best["step"], best["perplexity"]),
            iteration=saved["iteration"],
            tokens_seen=saved["tokens_seen"],
            skipped_in_a_row=saved["skipped_in_a_row"],
            evaluated=saved["evaluated"],
            spreads=saved.get("spreads", {}),
        )
