"""`mlx-grpo demo`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console.output import Console


def demo(
    work: Annotated[Path, typer.Option(help="Directory for weights/ and runs/.")] = Path("."),
    iterations: Annotated[int, typer.Option(help="Training iterations.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 42,
    quiet: Quiet = False,
) -> bool:
    """The whole story on an embedded model: convert, train, show what changed."""
    from mlx_grpo.demo import demo as run

    return run(work, iterations, seed, Console(quiet))
