"""Raw rewards of an iteration: reward model, custom functions, and the moving normaliser."""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.errors import InputError
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.types import Group

EPSILON = 1e-6
RewardFunction = Callable[..., Sequence[float]]


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
    """A user's reward function and its weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0

    def __call__(self, group: Group) -> list[float]:
        """Score the completions of a group.

        The function gets those keyword arguments that it names: `prompt` (str), `messages`,
        `completions` (list of str), `completion_ids`, `finish_reasons`, and the fields of the
        prompt's row (`id`, `response` and any other). It returns a number per completion.

        Raises:
            InputError: it raises, returns another count, or something that is not a finite number.
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
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
        try:
            scores = [float(s) for s in self.function(**arguments)]
        except (
            Exception
        ) as e:  # a user's code may raise anything; the run ends with one line either way
            raise InputError(
                f"reward '{self.name}' failed on prompt '{group.prompt.id}': "
                f"{type(e).__name__}: {e}"
            ) from e
        if len(scores) != len(group.completions):
            raise InputError(
                f"reward '{self.name}' returned {len(scores)} scores for "
                f"{len(group.completions)} completions"
            )
        if not all(map(math.isfinite, scores)):
            raise InputError(
                f"reward '{self.name}' returned {scores} on prompt '{group.prompt.id}'; return "
                "finite numbers"
            )
        return scores


def load_reward(spec: str, weight: float = 1.0) -> CustomReward:
    """Load `module:function` or `path/file.py:function`.

    Raises:
        InputError: no such module, file or function.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"--reward {spec}: write it as module:function or file.py:function")
    try:
        if source.endswith(".py"):
            module = _load_file(Path(source))
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))  # as `python -m` would
            module = importlib.import_module(source)
    except Exception as e:  # importing runs the user's code, which may raise anything
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"--reward {spec}: cannot import '{source}' ({reason})") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: '{source}' has no function '{name}'")
    return CustomReward(name, function, weight)


def _load_file(path: Path) -> Any:
    # a name of its own: a file called json.py must not take the place of the real module
    spec = importlib.util.spec_from_file_location(f"mlx_grpo_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError("no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class RewardMix:
    """A reward model, custom functions, and how they add up to the raw reward."""

    model: RewardModel | None
    model_weight: float
    custom: tuple[CustomReward, ...]

    def __call__(self, groups: Sequence[Group]) -> tuple[list[list[float]], dict[str, list[float]]]:
        """(raw rewards [P][K], each source's own scores, flat)."""
        totals: list[list[float]] = []
        parts: dict[str, list[float]] = {}
        for group in groups:
            total = [0.0] * len(group.completions)
            for name, weight, scores in self._sources(group):
                parts.setdefault(name, []).extend(scores)
                total = [t + weight * s for t, s in zip(total, scores, strict=True)]
            totals.append(total)
        return totals, parts

    def _sources(self, group: Group) -> Iterator[tuple[str, float, list[float]]]:
        if self.model:
            scores = self.model.score(group)
            if not all(map(math.isfinite, scores)):
                raise InputError(
                    f"reward model: scores {scores} on prompt '{group.prompt.id}' are not finite; "
                    "check the reward model with 'mlx-grpo convert'"
                )
            yield "reward_model", self.model_weight, scores
        for reward in self.custom:
            yield reward.name, reward.weight, reward(group)
