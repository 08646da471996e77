"""Raw rewards of an iteration: reward model, custom functions, and the moving normaliser."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.models.streamed_reward_model import StreamedRewardModel
from mlx_grpo.reward_process import RewardProcess
from mlx_grpo.reward_worker import RewardError

EPSILON = 1e-6
RewardFunction = Callable[[dict[str, Any], SafePoint], list[float]]
"""(keyword arguments, safe point) -> a number per completion; raises RewardError."""


@dataclass(frozen=True)
class ScoreNormalizer:
    """Exponential moving mean and standard deviation of raw scores, started from the first batch.

    mean <- alpha * mean + (1 - alpha) * mean(batch), std likewise; z = clip((r - mean) / (std +
    eps), -limit, limit).
    """

    alpha: float = 0.99
    limit: float = 5.0
    mean: float | None = None
    std: float | None = None

    def observe(self, scores: Sequence[float]) -> "ScoreNormalizer":
        """The normaliser after a batch of raw scores (population standard deviation)."""
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        if self.mean is None or self.std is None:
            return ScoreNormalizer(self.alpha, self.limit, mean, std)
        a = self.alpha
        return ScoreNormalizer(
            a, self.limit, a * self.mean + (1 - a) * mean, a * self.std + (1 - a) * std
        )

    def __call__(self, score: float) -> float:
        """z of one raw score."""
        if self.mean is None or self.std is None:
            raise RuntimeError("a normaliser must observe a batch before it can normalise")
        return min(max((score - self.mean) / (self.std + EPSILON), -self.limit), self.limit)


@dataclass(frozen=True)
class CustomReward:
    """A user's reward function and its weight; a weight of 0 means measured, not trained on."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str | None = None
    """Where it was written."""

    def __call__(self, group: Group, safe_point: SafePoint = never_stop) -> list[float]:
        """Score the completions of a group.

        The function gets those keyword arguments that it names: `prompt` (str), `messages`,
        `completions` (list of str), `completion_ids`, `finish_reasons`, and the fields of the
        prompt's row (`id`, `response` and any other). It returns a number per completion.

        Raises:
            InputError: it raises, hangs, or returns another count or something that is no number.
        """
        arguments = {
            **group.prompt.fields,
            "id": group.prompt.id,
            "response": group.prompt.response,
            "prompt": group.prompt.messages[-1]["content"],
            "messages": list(group.prompt.messages),
            "completions": [c.text for c in group.completions],
            "completion_ids": [list(c.token_ids) for c in group.completions],
            "finish_reasons": [c.finish_reason for c in group.completions],
        }
        try:
            return self.function(arguments, safe_point)
        except RewardError as e:
            raise InputError(
                f"reward '{self.name}' failed on prompt '{group.prompt.id}': "
                f"{' '.join(str(e).split())}"
            ) from e


def load_reward(spec: str, weight: float = 1.0, timeout: float = 60.0) -> CustomReward:
    """Load `module:function` or `path/file.py:function` in a process of its own.

    Raises:
        InputError: no such module, file or function.
    """
    process = RewardProcess(spec, timeout)
    return CustomReward(spec.rpartition(":")[2], process, weight, process.file)


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
