"""Custom reward functions: a user's code, called in a process of its own."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.files.manifest import sha256
from mlx_grpo.rewards.environments import Environments
from mlx_grpo.rewards.process import RewardProcess, no_relay
from mlx_grpo.rewards.worker import RewardError, call

Scores = list[float | None]
"""A number per completion; None where a function does not apply."""
RewardFunction = Callable[[dict[str, Any], SafePoint], Scores]
"""(keyword arguments, safe point) -> scores; raises RewardError."""
UserFunction = Callable[..., Any]
PYTHON = "python:"
"""Before the name of a function that was given as an object, in the settings."""


@dataclass(frozen=True)
class CustomReward:
    """A user's reward function and its weight; a weight of 0 means measured, not trained on."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str | None = None
    """Where it was written."""
    source: str | None = None
    """Its text, where it was given as an object."""

    def digest(self) -> str | None:
        """sha256 of what it was written as, where that is known."""
        if self.file:
            return sha256(Path(self.file))
        return hashlib.sha256(self.source.encode()).hexdigest() if self.source else None

    def __call__(self, group: Group, safe_point: SafePoint = never_stop) -> Scores:
        """Score the completions of a group.

        The function gets those keyword arguments that it names: `prompt` (str), `messages`,
        `completions` (list of str), `completion_ids`, `finish_reasons`, and the fields of the
        prompt's row (`id`, `response` and any other). One that names `prompts` is called as TRL
        would call it: prompts and fields are lists. With --environment there are also `turns`, the
        messages of each completion, and `environments`, the public attributes of each environment.
        It returns a number per completion, or None for one that it has nothing to say about.

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
        if any(c.turns for c in group.completions):
            arguments["turns"] = [list(c.turns) for c in group.completions]
            arguments["environments"] = [c.outcome.state for c in group.completions]
            arguments["environment_rewards"] = [c.outcome.reward for c in group.completions]
        try:
            return self.function(arguments, safe_point)
        except RewardError as e:
            raise InputError(
                f"reward '{self.name}' failed on prompt '{group.prompt.id}': "
                f"{' '.join(str(e).split())}"
            ) from e


def environment_reward(environments: Environments) -> CustomReward:
    """What the environments' own `reward` gave."""
    name = environments.name

    def given(arguments: dict[str, Any], safe_point: SafePoint) -> Scores:
        safe_point()
        return list(arguments["environment_rewards"])

    return CustomReward(name, given, file=environments.file)


def load_reward(
    spec: str,
    weight: float = 1.0,
    timeout: float = 60.0,
    relay: Callable[[str], None] = no_relay,
) -> CustomReward:
    """Load `module:function` or `path/file.py:function` in a process of its own.

    Args:
        relay: told each line that the function prints.

    Raises:
        InputError: no such module, file or function.
    """
    process = RewardProcess(spec, timeout, relay)
    return CustomReward(spec.rpartition(":")[2], process, weight, process.file)


def named(functions: Sequence[UserFunction]) -> dict[str, UserFunction]:
    """Functions that were given as objects, by the names that figures have.

    Raises:
        InputError: one is no function, or two have one name.
    """
    if not isinstance(functions, Sequence):
        raise InputError(f"rewards: must be a list of functions, not {type(functions).__name__}")
    found: dict[str, UserFunction] = {}
    for function in functions:
        if not callable(function):
            raise InputError(f"rewards: must be functions, not {type(function).__name__}")
        name = getattr(function, "__name__", type(function).__name__)
        if name in found:
            raise InputError(f"rewards: two functions are named '{name}'; rename one")
        found[name] = function
    return found


def given_reward(spec: str, weight: float, functions: Mapping[str, UserFunction]) -> CustomReward:
    """The function behind a spec `python:NAME`, called in this process.

    Raises:
        InputError: it is not among those that were given.
    """
    name = spec.removeprefix(PYTHON)
    if name not in functions:
        raise InputError(
            f"reward '{name}' was given from Python, so resume it from there: "
            f"train(config, rewards=[{name}], resume=True)"
        )
    function = functions[name]

    def here(arguments: dict[str, Any], safe_point: SafePoint) -> Scores:
        safe_point()
        # copies, as a process of its own would get
        return call(function, json.loads(json.dumps(arguments)))

    return CustomReward(name, here, weight, source=_source(function))


def _source(function: UserFunction) -> str | None:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into a shell, built in, or an object
        return None
