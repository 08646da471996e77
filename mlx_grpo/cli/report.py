"""`mlx-grpo report`."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console.output import Console


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or one that holds some.")],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write (default: report.html in the run, or beside the runs)."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page: figures, curves, warnings, answers; mean and spread of several runs."""
    from mlx_grpo.report.write import write_report

    ui = Console(quiet)
    page = write_report(runs, output)
    ui.say(f"written to {page}")
    address = page.resolve().as_uri()
    if show and not webbrowser.open(address):
        ui.warn(f"no browser found; open this yourself: {address}")
