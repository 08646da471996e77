"""A run on disk: configuration, logs, checkpoints, adapters; opened, saved, restored."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo import checkpoint, log
from mlx_grpo.config import TrainConfig
from mlx_grpo.config_sources import to_toml
from mlx_grpo.errors import InputError
from mlx_grpo.files import atomic_directory, sha256, write_text
from mlx_grpo.models.lora import lora_parameters, save_adapter, set_parameters
from mlx_grpo.state import RunState
from mlx_grpo.types import Group

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"


def check_vacant(run: Path, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume where there is none.

    Raises:
        InputError: with the way out.
    """
    if resume and not is_run(run):
        raise InputError(f"{run}: no run to resume here; start without --resume")
    if not resume and run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run}: not empty; continue with --resume or choose another --output")


def is_run(run: Path) -> bool:
    """Whether a run was started in this directory."""
    return (run / CONFIG).is_file()


def open_new(run: Path, config: TrainConfig) -> None:
    """Make the directory and write the configuration."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, to_toml(config))


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    return {name: version(name) for name in ("mlx-grpo", "mlx", "mlx-lm", "numpy", "transformers")}


def save(
    run: Path, config: TrainConfig, state: RunState, actor: nn.Module, optimizer: optim.Optimizer
) -> None:
    """Write a checkpoint after the iterations done so far."""
    arrays = {n: v for n, v in tree_flatten(optimizer.state) if isinstance(v, mx.array)}
    about = {
        "config_digest": config.digest(),
        "prompts_sha256": sha256(Path(config.prompts)),
        "versions": versions(),
    }
    saved = checkpoint.Checkpoint(
        state.iteration, lora_parameters(actor), arrays, {**state.to_json(), **about}
    )
    checkpoint.save(run / CHECKPOINTS, saved, config.keep)


def restore(
    run: Path, config: TrainConfig, state: RunState, actor: nn.Module, optimizer: optim.Optimizer
) -> tuple[RunState, list[str]]:
    """Load the newest good checkpoint into actor and optimizer, and cut the logs back to it.

    A run that ended before its first checkpoint starts again.

    Returns:
        (the state to go on from, one line for each newer checkpoint that did not verify).

    Raises:
        InputError: no usable checkpoint, or one of another configuration.
    """
    if not checkpoint.step_directories(run / CHECKPOINTS):
        for name in (log.METRICS, log.COMPLETIONS):
            (run / name).unlink(missing_ok=True)
        write_text(run / CONFIG, to_toml(config))
        return state, []
    saved, skipped = checkpoint.load_newest(run / CHECKPOINTS)
    if saved.state["config_digest"] != config.digest():
        raise InputError(
            f"{run}: the flags differ from those of the run; resume with --config {run / CONFIG}"
        )
    if saved.state["prompts_sha256"] != sha256(Path(config.prompts)):
        raise InputError(f"{config.prompts}: changed since the run started; put the old file back")
    set_parameters(actor, saved.adapter)
    optimizer.state = tree_unflatten(list(saved.optimizer.items()))
    for name in (log.METRICS, log.COMPLETIONS):
        log.truncate(run / name, saved.iteration)
    return state.with_json(saved.state), skipped


def save_named_adapter(run: Path, name: str, actor: nn.Module) -> None:
    """Write `best/` or `final/`, an adapter in mlx-lm's format, in one step."""
    with atomic_directory(run / name, replace=True) as temporary:
        save_adapter(temporary, actor)


def log_completions(
    run: Path, step: int, groups: Sequence[Group], raw_PK: Sequence[Sequence[float]]
) -> None:
    """Append every sampled answer with its raw reward."""
    rows = [
        {
            "step": step,
            "id": group.prompt.id,
            "prompt": group.prompt.messages[-1]["content"],
            "completion": c.text,
            "finish_reason": c.finish_reason,
            "reward": reward,
        }
        for group, rewards in zip(groups, raw_PK, strict=True)
        for c, reward in zip(group.completions, rewards, strict=True)
    ]
    log.append(run / log.COMPLETIONS, *rows)
