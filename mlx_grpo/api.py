"""Training from Python: `from mlx_grpo import GRPOConfig, train`.

Every setting is a field of `GRPOConfig`; they are the flags of `mlx-grpo train`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import TrainConfig as GRPOConfig
from mlx_grpo.config.sources import field_types, typed_flags
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.distributed.launch import launched
from mlx_grpo.run import log
from mlx_grpo.training.loop import train as train_run

__all__ = ["GRPOConfig", "Run", "train"]


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


def train(config: GRPOConfig, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train; the run directory is `config.output`, or runs/seed-SEED.

    A script that mlx.launch has started trains together with its other ranks.

    Raises:
        InputError: a setting or a file that cannot work, or a value of a wrong type, in one line;
            it is a ValueError.
    """
    config = _typed(config)
    for name, value in (("resume", resume), ("quiet", quiet)):
        if not isinstance(value, bool):  # a text such as "no" would count as yes
            raise InputError(f"{name}: must be True or False, not {value!r}")
    ui = Console(quiet)
    with launched(ui) as ranks:
        finished = train_run(config, ui, resume, ranks=ranks)
    return Run(config.run_directory, finished, ranks.leads)


def _typed(config: Any) -> GRPOConfig:
    """The configuration with every value in its field's type: a list may stand for a tuple, a whole
    number for any other.

    Raises:
        InputError: it is no GRPOConfig, or a value is of another type.
    """
    if not isinstance(config, GRPOConfig):
        raise InputError(f"config: must be a GRPOConfig, not {type(config).__name__}")
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    for name, kind in field_types(GRPOConfig).items():
        if kind in (int, float) and isinstance(values[name], str):  # text is for flags
            raise InputError(f"{name}: must be a number, not the text {values[name]!r}")
    return GRPOConfig(**typed_flags(GRPOConfig, values))
