"""Training from Python: `from mlx_grpo import GRPOConfig, train`.

The settings are those of `mlx-grpo train`, by the names of its flags.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.config.sources import build_config, flat_name, setting_types
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.distributed.launch import launched
from mlx_grpo.rewards.functions import PYTHON, UserFunction, named
from mlx_grpo.run import log
from mlx_grpo.training.loop import train as train_run

__all__ = ["GRPOConfig", "Run", "train"]


def GRPOConfig(**settings: Any) -> TrainConfig:
    """Settings by the names of the flags: `GRPOConfig(K=4, kl_targets=(0.05,))`.

    Whether the rewards fit together is checked by `train`, which may be given more of them.

    Raises:
        InputError: an unknown setting, a wrong type, or a value out of range.
    """
    flags = {flat_name("GRPOConfig", n): v for n, v in settings.items()}
    for name, value in flags.items():
        number = setting_types()[name] in (int, float)
        if value is None or (number and isinstance(value, str)):  # text is for flags
            raise InputError(f"{name}: must be {'a number' if number else 'set'}, not {value!r}")
    return build_config(flags=flags, more_rewards=True)


@dataclass(frozen=True)
class Run:
    """What a training left in its directory."""

    directory: Path
    finished: bool
    """False where Ctrl-C ended it early: call `train` again with `resume=True`."""
    leads: bool = True
    """Whether this process has written the directory: of several ranks only the first does."""

    @property
    def best(self) -> Path | None:
        """The adapter of the best evaluation; None where none passed the KL gate."""
        return self._adapter("best")

    @property
    def final(self) -> Path | None:
        """The adapter of the last iteration; None before the end."""
        return self._adapter("final")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: iterations, and evaluations (`eval_reward` and so on)."""
        return log.read(self.directory / log.METRICS)

    def _adapter(self, name: str) -> Path | None:
        return self.directory / name if (self.directory / name).is_dir() else None


def train(
    config: TrainConfig,
    *,
    rewards: Sequence[UserFunction] = (),
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Train; the run directory is `--output`, or runs/seed-SEED.

    A script that mlx.launch has started trains together with its other ranks.

    Args:
        rewards: reward functions beside those of the `reward` setting, called in this process, so
            that --reward-timeout does not end them. `reward_weights` has the weights of all, in
            this order. Give them again with `resume`.

    Raises:
        InputError: a setting or a file that cannot work, or a value of a wrong type, in one line;
            it is a ValueError.
    """
    if not isinstance(config, TrainConfig):
        raise InputError(f"config: must be a GRPOConfig, not {type(config).__name__}")
    for name, value in (("resume", resume), ("quiet", quiet)):
        if not isinstance(value, bool):  # a text such as "no" would count as yes
            raise InputError(f"{name}: must be True or False, not {value!r}")
    ui, functions = Console(quiet), named(rewards)
    given = (PYTHON + name for name in functions)
    config = with_settings(config, reward=(*config.reward.functions, *given))
    with launched(ui) as ranks:
        finished = train_run(config, ui, resume, ranks=ranks, functions=functions)
    return Run(config.run_directory, finished, ranks.leads)
