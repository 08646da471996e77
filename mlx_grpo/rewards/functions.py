"""Custom reward functions: a user's code, called in a process of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.rewards.process import RewardProcess
from mlx_grpo.rewards.worker import RewardError

RewardFunction = Callable[[dict[str, Any], SafePoint], list[float]]
"""(keyword arguments, safe point) -> a number per completion; raises RewardError."""


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
        prompt's row (`id`, `response` and any other). It returns a number per completion. One that
        names `prompts` is called as TRL would call it: prompts and fields are lists.

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
