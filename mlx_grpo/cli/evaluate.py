"""`mlx-grpo eval`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console import Console


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Held-out prompts instead of the run's own.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="best or final (default: best if there).")] = "",
    rubric: Annotated[
        bool, typer.Option("--rubric", help="Also judge by the rubric of the demo.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare a run with the SFT model on held-out prompts: reward, KL, perplexity, wins."""
    from mlx_grpo.compare import compare_run, show_comparison

    ui = Console(quiet)
    show_comparison(ui, compare_run(run, prompts, adapter, ui), rubric)
