"""`mlx-grpo samples`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console.output import Console


def samples(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    iteration: Annotated[
        int | None, typer.Option(help="Iteration to look at (default: the last).", min=0)
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Only prompts with this id, or with this text in them.")
    ] = "",
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Answers of an evaluation on held-out prompts, each beside the SFT model's.",
        ),
    ] = False,
    limit: Annotated[
        int,
        typer.Option(help="Most prompts to show, taken evenly from best to worst; 0: all.", min=0),
    ] = 4,
    quiet: Quiet = False,
) -> None:
    """Show the answers of an iteration side by side, by prompt and from the highest reward to the
    lowest."""
    from mlx_grpo.report.samples import sheets

    ui = Console(quiet)
    found = sheets(run, iteration, prompt, held_out, limit)
    ui.say(found.title)
    ui.say("")
    for sheet in found.shown:
        ui.side_by_side(sheet.prompt, sheet.answers)
    if len(found.shown) < found.total:
        ui.say(f"{len(found.shown)} of {found.total} prompts; --limit 0 shows all")
