"""`mlx-grpo plan`."""

from typing import Annotated, Any

import typer

from mlx_grpo.cli.options import ConfigFile, Quiet, train_flags, with_flags
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.plan.devices import MACS, THIS, check_name


@with_flags(train_flags())
def plan(
    flags: dict[str, Any],
    config: ConfigFile = None,
    device: Annotated[
        str,
        typer.Option(
            help="Machine whose time is estimated: this (measured for some seconds), or a Mac: "
            f"{', '.join(MACS)}. For a Mac give its --memory-limit too."
        ),
    ] = THIS,
    ranks: Annotated[
        int, typer.Option(min=1, help="Machines of this kind that share the prompts (mlx.launch).")
    ] = 1,
    link: Annotated[
        str, typer.Option(help="Speed of the slowest link between them, such as 600Mb/s.")
    ] = "10Gb/s",
    quiet: Quiet = False,
) -> None:
    """Estimate memory and time of a training run before it starts.

    Takes the flags of train and reads no weights: each stage's peak, what fits the limit, seconds.
    """
    from mlx_grpo.plan.planner import machine_of, planner_for
    from mlx_grpo.plan.scaling import link_speed
    from mlx_grpo.plan.tables import check_fits, show, show_savings, show_scaling, show_time

    settings, ui = build_config(config, flags), Console(quiet)
    check_name(device)
    here = device == THIS
    speed = link_speed(link)
    planner = planner_for(settings, here, ranks)
    found = planner.plan()
    if found.fits:
        machine = machine_of(device, found, planner.config)
        show(planner, found, ui)
        show_time(planner.times(found, machine), settings.run.num_iterations, machine, ui)
        show_savings(planner.savings(machine), ui)
        if ranks > 1:
            show_scaling(planner.scaled(machine, speed), link, ui)
    check_fits(planner, found, ui)
