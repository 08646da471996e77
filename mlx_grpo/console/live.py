"""What a terminal shows while a run goes on: where it is, and its figures with their trend."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_grpo.console.doing import Doing, duration

STAGES = ("rollout", "reward", "logprob", "update")
BAR_CELLS = 36
STAGE_CELLS = 24
TREND = 10
"""Iterations whose mean is compared with that of as many before."""
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_CELLS = 24
NARROW = 76
"""Columns below which figures follow one another instead of standing in a table."""
LEAST_BAR = 6
DRAWN = (
    *("step", "reward", "kl", "kl/target", "kl/beta", "kl/decay", "frac_dead_groups"),
    *("completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean"),
    *("time/left", "time/iteration", "time/tokens_per_second", "time/update_tokens_per_second"),
    *("memory/peak", *(f"time/{stage}" for stage in STAGES)),
)
"""What the picture shows of an iteration."""
Figure = tuple[str, str]
"""(name, value)."""


class LiveView:
    """The picture of a run; rich asks for it a few times a second."""

    def __init__(
        self,
        total: int,
        run: tuple[int, int] = (1, 1),
        before: Sequence[dict[str, Any]] = (),
    ):
        self.total = total
        self.run = run
        """Which of how many runs."""
        self.doing: Doing | None = Doing("starting")
        """What is done between the stages; None once nothing is done any more."""
        self.history = [row for row in before if _drawable(row)]
        """Metrics of the iterations so far, without those that were skipped."""
        self._begun = 0
        self._running: tuple[int, str, float] | None = None
        """(iteration, stage, when it began); one value, for rich draws from a thread of its own."""

    @contextmanager
    def stage(self, step: int, name: str) -> Iterator[None]:
        """The block is this stage of this iteration."""
        self._begun, self._running = step, (step, name, time.monotonic())
        try:
            yield
        finally:
            self._running = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        narrow = width < NARROW
        now_doing = self._stages(width)
        parts: list[RenderableType] = [Text(), *self._progress(width)]
        parts += [now_doing] if now_doing else []
        if self.history:
            now = self.history[-1]
            parts += [Text(), *self._trends(now, narrow, width), Text()]
            figures = self._figures(now)
            parts += flow(figures, width) if narrow else [_table(figures)]
        # a console that wraps nothing itself would cut what is too long for a line
        yield from console.render(Group(*parts), options.update(no_wrap=False, overflow="fold"))

    def _progress(self, width: int) -> list[RenderableType]:
        # an iteration that was skipped is not in the history
        done = max(self._begun - 1, self.history[-1]["step"] if self.history else 0)
        count, left = f"{done}/{self.total}", self._left()
        taken = len(f"iterations  {count} {left}")
        if width < taken + LEAST_BAR:
            return list(flow([("iterations", count), ("", left)], width))
        cells = min(BAR_CELLS, width - taken)
        row = _grid(4, gap=1)
        label = "iterations" if self.run[1] == 1 else f"run {self.run[0]} of {self.run[1]}"
        bar = ProgressBar(self.total, done, width=cells, complete_style="cyan")
        row.add_row(Text(label, style="bold"), bar, count, left)
        return [row]

    def _left(self) -> str:
        left = self.history[-1]["time/left"] if self.history else 0.0
        return f"{duration(left)} left" if left else ""

    def _stages(self, width: int) -> RenderableType | None:
        """A bar as long as the last iteration took, in stages; or what is done between. Where that
        is too wide, the stage it is in."""
        if (running := self._running) is None:
            return self.doing
        step, stage, since = running
        elapsed = time.monotonic() - since
        took = self._took()
        shown = STAGES if width >= NARROW else (stage,)
        text = Text(f"{step}:")
        for name in shown:
            now = name == stage
            before = STAGES.index(name) < STAGES.index(stage)
            cells = max(2, round(STAGE_CELLS * took[name] / sum(took.values())))
            # the last iteration's time is only an estimate: never quite full while it lasts
            share = min(elapsed / took[name], 0.99) if now else float(before)
            full = int(share * cells)
            text.append(f" {name} ", style="bold" if now else "dim")
            text.append("━" * full, style="green" if before else "cyan")
            text.append("┄" * (cells - full), style="dim")
        return text.append(f"  {duration(elapsed)}", style="dim")

    def _took(self) -> dict[str, float]:
        """Seconds of each stage in the last iteration; before there is one, a guess."""
        if not self.history:
            return {"rollout": 10.0, "reward": 4.0, "logprob": 10.0, "update": 17.0}
        return {name: max(self.history[-1][f"time/{name}"], 1e-3) for name in STAGES}

    def _trends(self, m: dict[str, Any], narrow: bool, width: int) -> list[RenderableType]:
        rewards, kls = ([row[key] for row in self.history] for key in ("reward", "kl"))
        reward = (f"{m['reward']:+.3f}", _bars(rewards), trend(rewards))
        kl = (f"{m['kl']:.4f}", _bars(kls), f"target {m['kl/target']:g}")
        if narrow:
            told = [("reward", reward[0]), ("", reward[2]), ("KL", kl[0]), ("", kl[2])]
            return list(flow(told, width))
        table = _grid(4, right=(1,))
        table.add_row(_dim("reward"), *reward)
        table.add_row(_dim("KL"), *kl)
        return [table]

    def _figures(self, m: dict[str, Any]) -> list[Figure]:
        beta = ("beta", f"{m['kl/beta']:.3g}")
        return [
            beta if m["kl/beta"] else ("decay", f"{m['kl/decay']:.2f}"),
            ("length", f"{m['completions/mean_length']:.0f} tokens"),
            ("rollout", f"{m['time/tokens_per_second']:.0f} tok/s"),
            ("clip fraction", f"{m['clip_ratio/region_mean']:.3f}"),
            ("cut off", f"{m['completions/clipped_ratio']:.0%}"),
            ("update", f"{m['time/update_tokens_per_second']:.0f} tok/s"),
            ("dead groups", f"{m['frac_dead_groups']:.0%}"),
            ("peak memory", f"{m['memory/peak'] / 1e9:.2f} GB"),
            ("iteration", duration(m["time/iteration"])),
        ]


def flow(figures: Sequence[Figure], width: int) -> list[Text]:
    """Names and values one after the other, as many on a line as fit."""
    lines: list[Text] = []
    for name, value in figures:
        item = Text.assemble((name, "dim"), " " if name and value else "", value)
        if not item:
            continue
        if lines and lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1].append("  ").append_text(item)
        else:
            lines.append(item)
    return lines


def _table(figures: Sequence[Figure]) -> Table:
    """Three figures a line."""
    table = _grid(6, right=(1, 3, 5))
    for i in range(0, len(figures), 3):
        cells = [cell for name, value in figures[i : i + 3] for cell in (_dim(name), value)]
        table.add_row(*cells)
    return table


def _dim(text: str) -> Text:
    return Text(text, style="dim")


def _drawable(row: dict[str, Any]) -> bool:
    """Whether a row of a log, which may hold null for NaN, is an iteration that can be shown."""
    return all(isinstance(row.get(name), int | float) for name in DRAWN)


def _bars(values: Sequence[float]) -> Text:
    return Text(sparks(values), style="cyan")


def _grid(columns: int, right: tuple[int, ...] = (), gap: int = 2) -> Table:
    """A table without lines whose columns `right` are set to the right."""
    table = Table.grid(padding=(0, gap))
    for i in range(columns):
        table.add_column(justify="right" if i in right else "left", no_wrap=True)
    return table


def sparks(values: Sequence[float]) -> str:
    """The latest values as a line of bars."""
    latest = [v for v in values[-SPARK_CELLS:] if v is not None and math.isfinite(v)]
    if len(latest) < 2:
        return ""
    low, high = min(latest), max(latest)
    step = (high - low) / (len(SPARKS) - 1) or 1.0
    return "".join(SPARKS[round((v - low) / step)] for v in latest)


def trend(values: Sequence[float]) -> str:
    """How the mean of the latest values differs from that of those before."""
    if len(values) < 2 * TREND:
        return ""
    change = fmean(values[-TREND:]) - fmean(values[-2 * TREND : -TREND])
    return f"{change:+.2f} in {TREND} iterations"
