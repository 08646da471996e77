"""Values that are not finite stop here: before the weights, the normaliser and the controller."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_grpo.core.types import Group

GuardedStage = Literal["reward", "logprob", "loss", "gradient"]


@dataclass(frozen=True)
class Skip:
    """What was left out because a value was not finite."""

    stage: GuardedStage
    positions: tuple[int, ...]
    """Which groups of the iteration's batch."""
    values: tuple[float, ...]
    """What was found: a number per completion, or the loss, or the norm of the gradient."""

    def row(self, iteration: int, groups: Sequence[Group]) -> dict[str, Any]:
        """One row of skipped.jsonl; numbers that JSON has no name for become texts."""
        return {
            "step": iteration,
            "stage": self.stage,
            "values": [v if math.isfinite(v) else str(v) for v in self.values],
            "groups": [
                {
                    "id": groups[p].prompt.id,
                    "messages": list(groups[p].prompt.messages),
                    "completions": [c.text for c in groups[p].completions],
                }
                for p in self.positions
            ],
        }


class NotFinite(ArithmeticError):
    """The iteration cannot go on with these values."""

    def __init__(self, skip: Skip):
        super().__init__(f"{skip.stage}: {skip.values}")
        self.skip = skip


def check_finite(stage: GuardedStage, values: Mapping[int, Sequence[float]]) -> None:
    """Raise NotFinite naming the groups whose values, [K] by position, are not all finite."""
    bad = tuple(p for p, row in values.items() if not all(map(math.isfinite, row)))
    if bad:
        raise NotFinite(Skip(stage, bad, tuple(v for p in bad for v in values[p])))
