"""`mlx-grpo train`: one run, or one for each seed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_grpo.cli.options import ConfigFile, Quiet, train_flags, with_flags
from mlx_grpo.config.checks import check
from mlx_grpo.config.settings import (
    FREE,
    ROUNDING,
    TrainConfig,
    flag_of,
    flat_values,
    with_settings,
)
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError, one_line

if TYPE_CHECKING:
    from mlx_grpo.distributed.ranks import Ranks


@dataclass(frozen=True)
class Run:
    """A run to be trained."""

    config: TrainConfig
    resume: bool = False


def _flags(names: Sequence[str]) -> str:
    return ", ".join(map(flag_of, names))


@with_flags(train_flags("seed"))
def train(
    flags: dict[str, Any],
    config: ConfigFile = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output with its own settings, bit for bit. These may "
            f"change: {_flags(FREE)}. These change the last bits: {_flags(ROUNDING)}. Input files "
            "may move to another path.",
        ),
    ] = False,
    allow_config_change: Annotated[
        bool,
        typer.Option(
            "--allow-config-change",
            help="Resume even though other settings, or the contents of inputs, have changed.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one iteration and keep nothing.")
    ] = False,
    notify: Annotated[
        bool,
        typer.Option(
            "--notify",
            help="Show a notification of the desktop when the runs have ended, or ring the "
            "terminal's bell.",
        ),
    ] = False,
    quiet: Quiet = False,
) -> bool:
    """Train a LoRA on the SFT model with GRPO.

    Give --seed several times to train one run after the other. Exits with 130 if Ctrl-C, SIGTERM, a
    closed terminal or a closed pipe stopped a run early.
    """
    from mlx_grpo.distributed.launch import launched

    ui = Console(quiet)
    with launched(ui) as ranks:
        runs = _runs(flags, config, resume) if ranks.leads else []
        runs = _shared(ranks, runs)
        with _notifying(ui, notify and ranks.leads) as ended:
            ended.append(train_all(runs, ui, dry_run, allow_config_change, ranks))
        return ended[0]


@contextmanager
def _notifying(ui: Console, wanted: bool) -> Iterator[list[bool]]:
    """Tell a person how the block ended, which puts into the list whether it came to its end."""
    from mlx_grpo.console.notify import notify

    ended: list[bool] = []
    try:
        yield ended
    except Exception as e:
        if wanted:
            notify(ui, f"failed: {one_line(e)}")
        raise
    if wanted:
        notify(ui, "finished" if ended[0] else "stopped early, saved")


def _runs(flags: dict[str, Any], file: Path | None, resume: bool) -> list[Run]:
    from mlx_grpo.run.directory import is_run, run_settings

    seeds = flags.pop("seed", [])
    own = resume and file is None  # runs know their settings: what is given is checked with these
    given = {name: v for name, v in flags.items() if name == "output" or not own}
    configs = [build_config(file, {**given, "seed": s}) for s in seeds]
    if not configs:
        configs = [build_config(file, given)]
    if len(configs) > 1:
        outputs = (c.run.output and f"{c.run.output}/seed-{c.run.seed}" for c in configs)
        configs = [with_settings(c, output=o) for c, o in zip(configs, outputs, strict=True)]
    runs = []
    for c in configs:
        started = is_run(c.run_directory)
        if own:
            # flags that contradict the run's settings are refused later
            asked = {**flags, "output": c.run.output, **({"seed": c.run.seed} if seeds else {})}
            c = run_settings(c.run_directory, asked) if started else build_config(None, asked)
        # of several seeds, those not started yet start now
        runs.append(Run(c, resume and (started or len(configs) == 1)))
    return runs


def _shared(ranks: "Ranks", runs: Sequence[Run]) -> list[Run]:
    """Rank 0's runs on every rank: only rank 0 sees the run directories."""
    plain = ranks.gather([(flat_values(r.config), r.resume) for r in runs])[0]
    if ranks.leads:
        return list(runs)
    return [Run(build_config(flags=values), resume) for values, resume in plain]


def train_all(
    runs: Sequence[Run], ui: Console, dry_run: bool, allow_change: bool, ranks: "Ranks"
) -> bool:
    """Train one run after the other on weights that are loaded once; False if a signal stopped one.

    Raises:
        InputError: wrong input; a directory in the way of the last run is found before the first.
    """
    from mlx_grpo.run.directory import check_vacant
    from mlx_grpo.training.loop import train
    from mlx_grpo.training.setup import SharedModels

    if len({run.config.run_directory for run in runs}) < len(runs):
        raise InputError("--seed: the same seed twice; give each once")
    for run in runs:
        check(run.config)
        if not dry_run and ranks.leads:
            check_vacant(run.config.run_directory, run.resume)
    load = SharedModels()
    for position, run in enumerate(runs, 1):
        name = f"seed {run.config.run.seed}, {run.config.run_directory}"
        ui.next_run(position, len(runs), name)
        if not train(run.config, ui, run.resume, dry_run, allow_change, load, ranks):
            return False
    if len(runs) > 1 and not dry_run and ranks.leads:
        _compare([r.config.run_directory for r in runs], ui)
    return True


def _compare(runs: Sequence[Path], ui: Console) -> None:
    from mlx_grpo.report.write import comparison, try_report

    if page := try_report(runs, ui.warn):
        title = f"{len(runs)} runs on held-out prompts, mean ± standard deviation"
        ui.table(title, ("", "SFT model", "after GRPO"), comparison(runs))
        ui.say(f"compared in {page}")
