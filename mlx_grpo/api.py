"""Training from Python: `from mlx_grpo import GRPOConfig, iterate, train`.

The settings are those of `mlx-grpo train`, by the names of its flags.
"""

from collections.abc import Iterator, Mapping, Sequence
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
from mlx_grpo.training.loop import OnLog, ignore, training
from mlx_grpo.training.loop import train as train_run

__all__ = ["GRPOConfig", "Run", "iterate", "train"]


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

    def dataframe(self) -> Any:
        """`metrics()` as a pandas DataFrame, a column for each figure.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("dataframe() needs pandas; type: pip install pandas") from None
        return pandas.DataFrame(self.metrics())

    def _adapter(self, name: str) -> Path | None:
        return self.directory / name if (self.directory / name).is_dir() else None


def train(
    config: TrainConfig,
    *,
    rewards: Sequence[UserFunction] = (),
    resume: bool = False,
    quiet: bool = False,
    on_log: OnLog = ignore,
) -> Run:
    """Train; the run directory is `--output`, or runs/seed-SEED.

    A script that mlx.launch has started trains together with its other ranks.

    Args:
        rewards: reward functions beside those of the `reward` setting, called in this process, so
            that --reward-timeout does not end them. `reward_weights` has the weights of all, in
            this order. Give them again with `resume`.
        on_log: called with each row of metrics.jsonl once it is written: an iteration (`reward`,
            `kl` and so on) or an evaluation (`eval_reward` and so on). If it raises, the run is
            saved first.

    Raises:
        InputError: a setting or a file that cannot work, or a value of a wrong type, in one line;
            it is a ValueError.
    """
    config, ui, functions = _checked(config, rewards, resume, quiet)
    if not callable(on_log):
        raise InputError(f"on_log: must be a function, not {type(on_log).__name__}")
    with launched(ui) as ranks:
        finished = train_run(config, ui, resume, ranks=ranks, functions=functions, on_log=on_log)
    return Run(config.run_directory, finished, ranks.leads)


def iterate(
    config: TrainConfig,
    *,
    rewards: Sequence[UserFunction] = (),
    resume: bool = False,
    quiet: bool = False,
) -> Iterator[dict[str, Any]]:
    """Train as `train` does, and give each row of metrics.jsonl once it is written.

    `break` stops the run as Ctrl-C does: it is saved, and `resume=True` goes on. Nothing is
    computed while the body of the loop runs.

    Args:
        rewards: as for `train`.

    Raises:
        InputError: as `train`.
    """
    return _rows(*_checked(config, rewards, resume, quiet), resume)


def _rows(
    config: TrainConfig, ui: Console, functions: Mapping[str, UserFunction], resume: bool
) -> Iterator[dict[str, Any]]:
    with launched(ui) as ranks:
        yield from training(config, ui, resume, ranks=ranks, functions=functions)


def _checked(
    config: TrainConfig, rewards: Sequence[UserFunction], resume: bool, quiet: bool
) -> tuple[TrainConfig, Console, dict[str, UserFunction]]:
    """The settings with the rewards that were given, where to speak, and these rewards by name."""
    if not isinstance(config, TrainConfig):
        raise InputError(f"config: must be a GRPOConfig, not {type(config).__name__}")
    for name, value in (("resume", resume), ("quiet", quiet)):
        if not isinstance(value, bool):  # a text such as "no" would count as yes
            raise InputError(f"{name}: must be True or False, not {value!r}")
    functions = named(rewards)
    given = (PYTHON + name for name in functions)
    config = with_settings(config, reward=(*config.reward.functions, *given))
    return config, Console(quiet), functions
