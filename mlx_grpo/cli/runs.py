"""`mlx-grpo runs`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console.output import Console


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """List the runs in a folder: state, iteration, reward, KL, best checkpoint, time, and what to
    type next.

    Reward and KL are those of the best evaluation on held-out prompts, or of the last one where
    none is the best.
    """
    from mlx_grpo.report.listing import COLUMNS, damages, listed

    ui = Console(quiet)
    found = listed(folder)
    ui.table(f"Runs in {folder}", COLUMNS, [one.row for one in found])
    for one in found:
        if one.next:
            ui.say(f"{one.run}: {one.next}")
    for damage in damages(found):
        ui.warn(damage)
