"""A run, or several, as one page of HTML that needs nothing else."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.files.atomic import write_text
from mlx_grpo.files.lock import held
from mlx_grpo.report.page import over, render, rows, title_of
from mlx_grpo.report.record import read
from mlx_grpo.run.directory import REPORT as REPORT
from mlx_grpo.run.directory import is_run


def write_report(
    runs: Sequence[Path], output: Path | None = None, running: bool | None = None
) -> Path:
    """Write the page in one step and return where it is.

    Args:
        runs: run directories, or directories that hold some.
        output: the file; by default `report.html` in the run, or in what the runs have in common.
        running: whether the runs go on; by default, whether a process is at work in them.

    Raises:
        InputError: no run there, or one without any figures yet.
    """
    # not resolve(), which raises where links form a loop
    found = list({os.path.realpath(run): run for g in runs for run in _runs_at(g)}.values())
    records = [read(run, held(run) if running is None else running) for run in found]
    target = output or _common(found) / REPORT
    if target.is_dir():
        raise InputError(f"{target}: a directory; name a file, as {target / REPORT}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: no such directory as {target.parent}; make it first")
    write_text(target, render(records, title_of(found)))
    return target


def try_report(
    runs: Sequence[Path], warn: Callable[[str], None], running: bool = False
) -> Path | None:
    """Write the page of runs that are being trained; a night's work must not end for a page, so
    `warn` is told whatever goes wrong."""
    try:
        return write_report(runs, running=running)
    except Exception as e:
        again = command("mlx-grpo", "report", *runs)
        warn(f"{REPORT} not written ({one_line(e)}); try: {again}")
        return None


def comparison(runs: Sequence[Path]) -> list[tuple[str, str, str]]:
    """(figure, SFT model, after) over runs: mean ± standard deviation, as on their page."""
    records = [read(run, running=False) for run in runs]
    return [(f.name, over(records, f, "first"), over(records, f, "chosen")) for f in rows(records)]


def _runs_at(directory: Path) -> list[Path]:
    """The run at a directory, or else those inside it."""
    inside = sorted(d for d in directory.iterdir() if is_run(d)) if directory.is_dir() else []
    return inside if inside and not is_run(directory) else [directory]


def _common(runs: Sequence[Path]) -> Path:
    if len(runs) == 1:
        return runs[0]
    return Path(os.path.commonpath([run.resolve().parent for run in runs]))
