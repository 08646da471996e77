"""`mlx-grpo plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_grpo.cli.options import Quiet, with_flags
from mlx_grpo.config import TrainConfig
from mlx_grpo.config_sources import build_config
from mlx_grpo.console import Console


@with_flags(TrainConfig, repeated=("reward", "eval_reward"))
def plan(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of the fields below.")
    ] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Any field as key=value.")] = None,
    quiet: Quiet = False,
) -> None:
    """Memory of a training run before it starts: each stage's peak, and what fits the limit.

    Takes the flags of train and reads no weights.
    """
    from mlx_grpo.planned import check_fits, plan_run, show

    settings, ui = build_config(config, set or (), flags), Console(quiet)
    found = plan_run(settings)
    if found.fits:
        show(found, ui)
    check_fits(settings, found, ui)
