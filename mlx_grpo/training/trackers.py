"""Where the figures go beside metrics.jsonl: TensorBoard, Trackio, Weights & Biases.

Each is an extra that is imported only when asked for. A tracker that fails while the run goes on is
told of once and left out: metrics.jsonl has everything.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import TrackerName, TrainConfig, flat_values
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.files.atomic import write_text

MODULES: dict[TrackerName, str] = {
    "tensorboard": "tensorboardX",
    "trackio": "trackio",
    "wandb": "wandb",
}
PROJECT = "mlx-grpo"

Tracker = Callable[[dict[str, Any]], None]
"""Given a row of metrics.jsonl."""
OpenTracker = tuple[Tracker, Callable[[], None]]
"""(write a row, close)."""
Warn = Callable[[str], None]


def check_installed(trackers: Sequence[TrackerName]) -> None:
    """Raise InputError with what to type if a tracker's library is missing."""
    for tracker in trackers:
        spec = importlib.util.find_spec(MODULES[tracker])
        if spec is None or spec.origin is None:  # none: a directory of that name, as wandb makes
            raise InputError(
                f"--log {tracker}: {MODULES[tracker]} is not installed; type: "
                + command("pip", "install", f"mlx-grpo[{tracker}]")
            )


@contextmanager
def open_trackers(config: TrainConfig, run: Path, step: int, warn: Warn) -> Iterator[Tracker]:
    """A function that hands a row to every tracker of `config.run.log`.

    Args:
        step: iterations done; a resumed run goes on where it was.
        warn: told, in a line, that a tracker has failed.
    """
    trackers: dict[TrackerName, OpenTracker] = {}
    to_open = list(config.run.log)

    def attempt(name: TrackerName, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except Exception as e:  # another library and its network: a run must not end for them
            trackers.pop(name, None)
            warn(f"--log {name} failed ({one_line(e)}); the run goes on without it")

    def log(row: dict[str, Any]) -> None:
        while to_open:  # not before there is something to log: bad input leaves nothing behind
            name = to_open.pop(0)
            open_sink = _tensorboard if name == "tensorboard" else _tracker
            if now_open := attempt(name, open_sink, name, config, run, step):
                trackers[name] = now_open
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        for name, (write, _) in list(trackers.items()):
            attempt(name, write, numbers)

    try:
        yield log
    finally:
        for name, (_, close) in list(trackers.items()):
            attempt(name, close)


def _tensorboard(name: TrackerName, config: TrainConfig, run: Path, step: int) -> OpenTracker:
    library = importlib.import_module(MODULES[name])
    writer = library.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else 0)
    if not step:
        writer.add_text(
            "config", "\n".join(f"    {k} = {v}" for k, v in flat_values(config).items())
        )

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, int(row["step"]))

    return write, writer.close


def _tracker(name: TrackerName, config: TrainConfig, run: Path, step: int) -> OpenTracker:
    """Trackio and Weights & Biases, which share their interface."""
    library = importlib.import_module(MODULES[name])
    title = _title(run, run / f"{name}.txt", begins=not step)
    identity = {"id": title} if name == "wandb" else {}  # Trackio resumes by the name
    library.init(
        project=PROJECT, name=title, config=flat_values(config), resume="allow", **identity
    )

    def write(row: dict[str, Any]) -> None:
        figures = {k: v for k, v in row.items() if k != "step"}
        # no step= of the library's: an evaluation comes after its iteration, with the same number
        library.log({**figures, "iteration": row["step"]})

    return write, library.finish


def _title(run: Path, kept: Path, begins: bool) -> str:
    """What a tracker calls a run. It is kept, so that a resumed run goes on under its name; it
    holds the time, so that a new run in a directory of the same name does not."""
    title = "-".join(run.resolve().parts[-2:])
    if begins:
        write_text(kept, f"{title}-{time.strftime('%Y%m%d-%H%M%S')}\n")
    # runs of older versions have none
    return kept.read_text("utf-8").strip() if kept.is_file() else title
