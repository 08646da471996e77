"""Raw rewards of an iteration: reward model, custom functions, and the moving normaliser."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.models.streamed_reward_model import StreamedRewardModel
from mlx_grpo.rewards.environments import Environments
from mlx_grpo.rewards.functions import CustomReward, Scores
from mlx_grpo.rewards.process import RewardProcess

LARGEST = 1e18
"""Largest size of a score: the mean and the spread of larger ones overflow in 32-bit floats."""


@dataclass(frozen=True)
class RewardMix:
    """A reward model, custom functions, and how they add up to the raw reward."""

    model: RewardModel | StreamedRewardModel | None
    model_weight: float
    custom: tuple[CustomReward, ...]
    environments: Environments | None = None
    """That completions are sampled with; they end with the rewards."""

    def __call__(
        self, groups: Sequence[Group], safe_point: SafePoint = never_stop
    ) -> tuple[list[list[float]], dict[str, Scores]]:
        """(raw rewards [P][K], each source's own scores, flat); the caller looks for NaN.

        A source that gives None is left out of the sum for that completion, as in TRL.

        Raises:
            InputError: a score is too large, or no source that counts has one for a whole group.
        """
        totals: list[list[float]] = []
        parts: dict[str, Scores] = {}
        streamed: list[list[float]] | list[None] = [None] * len(groups)
        if groups and isinstance(self.model, StreamedRewardModel):  # read once for all groups
            streamed = self.model.score_groups(groups, safe_point)
        for group, ready in zip(groups, streamed, strict=True):
            safe_point()
            counted = []
            for name, weight, scores in self._sources(group, safe_point, ready):
                parts.setdefault(name, []).extend(scores)
                if weight:  # 0 times a NaN would be one
                    _check_size(name, weight, scores, group)
                    counted.append((weight, scores))
            totals.append(_weighted_sum(counted, group))
        return totals, parts

    def _sources(
        self, group: Group, safe_point: SafePoint, ready: list[float] | None = None
    ) -> Iterator[tuple[str, float, Scores]]:
        if self.model:
            yield "reward_model", self.model_weight, [*(ready or self.model.score(group))]
        for reward in self.custom:
            yield reward.name, reward.weight, reward(group, safe_point)

    @property
    def weights(self) -> dict[str, float]:
        """Of the sources that count, by name."""
        model = {"reward_model": self.model_weight} if self.model else {}
        return {n: w for n, w in {**model, **{r.name: r.weight for r in self.custom}}.items() if w}

    @property
    def at_once(self) -> bool:
        """Whether scoring all groups in one call is far cheaper than one by one."""
        return isinstance(self.model, StreamedRewardModel)

    def check_finite(self, group: Group) -> None:
        """Raise InputError that names the source whose score of this group is not finite."""
        for name, weight, scores in self._sources(group, never_stop):
            if weight and not all(math.isfinite(s) for s in scores if s is not None):
                raise InputError(
                    f"reward '{name}' returned {scores} on prompt '{group.prompt.id}'; a reward "
                    "must be a finite number"
                )

    def close(self) -> None:
        """End the processes of the custom functions and of the environments."""
        if self.environments:
            self.environments.close()
        for reward in self.custom:
            if isinstance(reward.function, RewardProcess):
                reward.function.close()


def _check_size(name: str, weight: float, scores: Scores, group: Group) -> None:
    for score in scores:
        if score is not None and LARGEST < abs(weight * score) < math.inf:
            times = "" if weight == 1 else f" times its weight {weight:g}"
            raise InputError(
                f"reward '{name}' returned {score:g}{times} on prompt '{group.prompt.id}', more "
                f"than {LARGEST:g}, which 32-bit floats cannot work with; scale it down"
            )


def _weighted_sum(counted: Sequence[tuple[float, Scores]], group: Group) -> list[float]:
    """Of each completion, over the sources that have a score for it."""
    total = [0.0] * len(group.completions)
    given = [False] * len(total)
    for weight, scores in counted:
        for k, score in enumerate(scores):
            if score is not None:
                total[k] += weight * score
                given[k] = True
    if counted and len(total) > 1 and not any(given):
        raise InputError(
            f"prompt '{group.prompt.id}': every reward function returned None for all of its "
            f"{len(total)} completions; one of them must apply, or return 0"
        )
    return total
