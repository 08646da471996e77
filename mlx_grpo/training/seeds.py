"""Several runs in turn, as a rule the seeds of one experiment, on weights that are loaded once; and
their comparison."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_grpo.config.checks import check
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.config.sources import typed_flags
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.report.write import comparison, try_report
from mlx_grpo.run.directory import check_vacant
from mlx_grpo.training.loop import train
from mlx_grpo.training.setup import SharedModels


@dataclass(frozen=True)
class PlannedRun:
    """A run to be trained."""

    config: TrainConfig
    resume: bool = False


def planned_by_leader(ranks: Ranks, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that rank 0 has planned, on every rank: only rank 0 sees the run directories."""
    plain = ranks.gather([(asdict(r.config), r.resume) for r in runs])[0]
    if ranks.leads:
        return list(runs)
    return [PlannedRun(TrainConfig(**typed_flags(TrainConfig, c)), resume) for c, resume in plain]


def train_all(
    runs: Sequence[PlannedRun],
    ui: Console,
    dry_run: bool = False,
    allow_change: bool = False,
    ranks: Ranks = ALONE,
) -> bool:
    """Train one after the other; False if a signal ended one early, and then the rest is left.

    Raises:
        InputError: wrong input; a directory in the way of the last run is found before the first.
    """
    if len({run.config.run_directory for run in runs}) < len(runs):
        raise InputError("--seed: the same seed twice; give each once")
    for run in runs:
        check(run.config)
        if not dry_run and ranks.leads:
            check_vacant(run.config.run_directory, run.resume)
    load = SharedModels()
    done = True
    for position, run in enumerate(runs, 1):
        ui.next_run(position, len(runs), f"seed {run.config.seed}, {run.config.run_directory}")
        done = done and train(run.config, ui, run.resume, dry_run, allow_change, load, ranks)
    if done and len(runs) > 1 and not dry_run and ranks.leads:
        _compare([r.config.run_directory for r in runs], ui)
    return done


def _compare(runs: Sequence[Path], ui: Console) -> None:
    if page := try_report(runs, ui.warn):
        title = f"{len(runs)} runs on held-out prompts, mean ± standard deviation"
        ui.table(title, ("", "SFT model", "after GRPO"), comparison(runs))
        ui.say(f"compared in {page}")
