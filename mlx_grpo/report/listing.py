"""The runs of a folder, a line each: how far each is, its figures, and what to type next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo.console.doing import duration
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.lock import held
from mlx_grpo.report.health import Row
from mlx_grpo.report.record import Record, read_figures
from mlx_grpo.run import log
from mlx_grpo.run.directory import is_run, resume_command

COLUMNS = ("run", "state", "iteration", "reward", "KL", "best", "time")
DEPTH = 3
"""Levels of folders that are looked through: a folder of runs, and seeds inside one of them."""


@dataclass(frozen=True)
class Listed:
    """A run as the list has it."""

    run: Path
    cells: tuple[str, ...]
    """Of `COLUMNS`, the first excepted."""
    next: str
    """What to type next."""
    damage: str = ""
    """Why it cannot be read."""

    @property
    def row(self) -> tuple[str, ...]:
        return str(self.run), *self.cells


def listed(folder: Path) -> list[Listed]:
    """The runs in a folder, or the run that it is, by path.

    Raises:
        InputError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; name one that holds runs")
    found = [_listed(run) for run in runs_in(folder)]
    if not found:
        raise InputError(f"{folder}: no runs in it; start one with `mlx-grpo train`")
    return found


def runs_in(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Run directories at or below a folder, by path; hidden folders are left out."""
    if is_run(folder):
        return [folder]
    if not depth:
        return []
    inside = sorted(d for d in folder.iterdir() if not d.name.startswith(".") and d.is_dir())
    return [run for d in inside for run in runs_in(d, depth - 1)]


def _listed(run: Path) -> Listed:
    try:
        return _of_record(read_figures(run, held(run)))
    except (InputError, OSError) as e:  # one that cannot be read hides no other
        return Listed(run, ("damaged", *[""] * (len(COLUMNS) - 2)), "", str(e))


def _of_record(r: Record) -> Listed:
    figures = _figures(r.chosen) if r.evaluations else ("", "", "")
    cells = (state(r), f"{r.step}/{r.config.run.num_iterations}", *figures, _minutes(r))
    return Listed(r.run, cells, next_command(r))


def _figures(chosen: Row) -> tuple[str, str, str]:
    """Reward, KL, and the best iteration."""
    return (
        log.figure(chosen.get("eval_reward"), "+.3f"),
        log.figure(chosen.get("eval_kl"), ".4f"),
        str(chosen["step"]) if chosen["eval_best"] else "none",
    )


def state(r: Record) -> str:
    """What a run is doing, in a word."""
    return "running" if r.running else "finished" if r.finished else "stopped"


def next_command(r: Record) -> str:
    """What to type next: look at a run that goes on, go on with one that stopped, try what a
    finished one has learned; nothing before there are answers to look at."""
    if r.running:
        return command("mlx-grpo", "samples", r.run) if r.iterations else ""
    return command("mlx-grpo", "chat", r.run) if r.finished else resume_command(r.run)


def _minutes(r: Record) -> str:
    """What all iterations and evaluations took; seconds only below a minute."""
    keys = ("time/iteration", "time/evaluate")
    seconds = sum(row.get(key) or 0.0 for row in r.rows for key in keys)
    return (
        duration(60 * round(seconds / 60)).removesuffix(" 00 s")
        if seconds >= 60
        else duration(seconds)
    )


def damages(found: Sequence[Listed]) -> list[str]:
    """Why some of the runs cannot be read."""
    return [one.damage for one in found if one.damage]
