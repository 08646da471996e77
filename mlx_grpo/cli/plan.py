"""`mlx-grpo plan`."""

from typing import Annotated, Any

import typer

from mlx_grpo.cli.options import Assignments, ConfigFile, Quiet, with_flags
from mlx_grpo.config import REPEATED, TrainConfig
from mlx_grpo.config_sources import build_config
from mlx_grpo.console import Console
from mlx_grpo.devices import MACS, THIS, check_name


@with_flags(TrainConfig, repeated=REPEATED)
def plan(
    flags: dict[str, Any],
    config: ConfigFile = None,
    set: Assignments = None,
    device: Annotated[
        str,
        typer.Option(
            help="Machine whose time is estimated: this (measured for some seconds), or a Mac: "
            f"{', '.join(MACS)}. For a Mac give its --memory-limit too."
        ),
    ] = THIS,
    quiet: Quiet = False,
) -> None:
    """Estimate memory and time of a training run before it starts.

    Takes the flags of train and reads no weights: each stage's peak, what fits the limit, seconds.
    """
    from mlx_grpo.planned import check_fits, plan_run, show, show_time

    settings, ui = build_config(config, set or (), flags), Console(quiet)
    check_name(device)
    here = device == THIS
    found = plan_run(settings, here)
    if found.fits:
        show(found, ui)
        show_time(settings, found, device, ui)
    check_fits(settings, found, ui, here)
