"""Raw rewards of an iteration: reward model, custom functions, and the moving normaliser."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.models.streamed_reward_model import StreamedRewardModel
from mlx_grpo.rewards.functions import CustomReward
from mlx_grpo.rewards.process import RewardProcess


@dataclass(frozen=True)
class RewardMix:
    """A reward model, custom functions, and how they add up to the raw reward."""

    model: RewardModel | StreamedRewardModel | None
    model_weight: float
    custom: tuple[CustomReward, ...]

    def __call__(
        self, groups: Sequence[Group], safe_point: SafePoint = never_stop
    ) -> tuple[list[list[float]], dict[str, list[float]]]:
        """(raw rewards [P][K], each source's own scores, flat); the caller looks for NaN."""
        totals: list[list[float]] = []
        parts: dict[str, list[float]] = {}
        streamed: list[list[float]] | list[None] = [None] * len(groups)
        if groups and isinstance(self.model, StreamedRewardModel):  # read once for all groups
            streamed = self.model.score_groups(groups, safe_point)
        for group, ready in zip(groups, streamed, strict=True):
            safe_point()
            total = [0.0] * len(group.completions)
            for name, weight, scores in self._sources(group, safe_point, ready):
                parts.setdefault(name, []).extend(scores)
                if weight:  # 0 times a NaN would be one
                    total = [t + weight * s for t, s in zip(total, scores, strict=True)]
            totals.append(total)
        return totals, parts

    def _sources(
        self, group: Group, safe_point: SafePoint, ready: list[float] | None = None
    ) -> Iterator[tuple[str, float, list[float]]]:
        if self.model:
            yield "reward_model", self.model_weight, ready or self.model.score(group)
        for reward in self.custom:
            yield reward.name, reward.weight, reward(group, safe_point)

    @property
    def at_once(self) -> bool:
        """Whether scoring all groups in one call is far cheaper than one by one."""
        return isinstance(self.model, StreamedRewardModel)

    def check_finite(self, group: Group) -> None:
        """Raise InputError that names the source whose score of this group is not finite."""
        for name, weight, scores in self._sources(group, never_stop):
            if weight and not all(map(math.isfinite, scores)):
                raise InputError(
                    f"reward '{name}' returned {scores} on prompt '{group.prompt.id}'; a reward "
                    "must be a finite number"
                )

    def close(self) -> None:
        """End the processes of the custom functions."""
        for reward in self.custom:
            if isinstance(reward.function, RewardProcess):
                reward.function.close()
