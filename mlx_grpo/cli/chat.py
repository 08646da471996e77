"""`mlx-grpo chat`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console.output import Console


def chat(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    adapter: Annotated[
        str,
        typer.Option("--adapter", "--checkpoint", help="best or final (default: best if there)."),
    ] = "",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature; 0: the likeliest token (default: the run's).", min=0
        ),
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens (default: the run's).", min=1)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Talk to the SFT model and a run's adapter side by side.

    From a pipe, each line is a question of its own.
    """
    from mlx_grpo.evaluation.chat import hold, open_chat

    ui = Console(quiet)
    hold(open_chat(run, adapter, ui, temperature, max_completion_length or 0), ui)
