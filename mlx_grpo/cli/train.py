"""`mlx-grpo train`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_grpo.cli.options import Assignments, ConfigFile, Quiet, with_flags
from mlx_grpo.config.settings import FREE, REPEATED, ROUNDING, TrainConfig
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console

if TYPE_CHECKING:
    from mlx_grpo.training.seeds import PlannedRun


@with_flags(TrainConfig, repeated=("seed", *REPEATED))
def train(
    flags: dict[str, Any],
    config: ConfigFile = None,
    set: Assignments = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output with its own settings, bit for bit. Free to change: "
            f"{', '.join(FREE)}; {', '.join(ROUNDING)} move the last bits; inputs may move to "
            "another path.",
        ),
    ] = False,
    allow_config_change: Annotated[
        bool,
        typer.Option(
            "--allow-config-change",
            help="Resume although other settings, or the contents of inputs, have changed.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One iteration; nothing is kept.")
    ] = False,
    quiet: Quiet = False,
) -> bool:
    """Train a LoRA on the SFT model with GRPO.

    --seed may be given several times: the runs follow one another. Exit code 130 where Ctrl-C,
    SIGTERM, a closed terminal or a closed pipe ended it early.
    """
    from mlx_grpo.distributed.launch import launched
    from mlx_grpo.training.seeds import planned_by_leader, train_all

    ui = Console(quiet)
    with launched(ui) as ranks:
        runs = _planned(flags, config, set or (), resume) if ranks.leads else []
        runs = planned_by_leader(ranks, runs)
        return train_all(runs, ui, dry_run, allow_config_change, ranks)


def _planned(
    flags: dict[str, Any], file: Path | None, assignments: Sequence[str], resume: bool
) -> list["PlannedRun"]:
    from mlx_grpo.run.directory import is_run, settings
    from mlx_grpo.training.seeds import PlannedRun

    seeds = flags.pop("seed", [])
    configs = [build_config(file, assignments, {**flags, "seed": s}) for s in seeds]
    if not configs:
        configs = [build_config(file, assignments, flags)]
    if len(configs) > 1:
        configs = [replace(c, output=c.output and f"{c.output}/seed-{c.seed}") for c in configs]
    runs = []
    for c in configs:
        started = is_run(c.run_directory)
        if resume and started and file is None:
            # the run knows its own settings; flags that contradict them are refused later
            given = {**flags, "output": c.output, **({"seed": c.seed} if seeds else {})}
            c = settings(c.run_directory, assignments, given)
        # of several seeds, those not started yet start now
        runs.append(PlannedRun(c, resume and (started or len(configs) == 1)))
    return runs
