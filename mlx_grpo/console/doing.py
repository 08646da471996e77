"""What is being done right now: its name, a count, and a clock."""

import time

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_grpo.core.errors import single_line

BAR_CELLS = 24
FIRST_LINE_AFTER = 1.0
"""Seconds until the first count, where there is no terminal."""
SECONDS_BETWEEN_LINES = 20.0


class Doing:
    """A piece of work that may take long; rich draws it, a log gets a line of it now and then."""

    def __init__(self, what: str):
        self.what = single_line(what)
        self.done: tuple[int, int] | None = None
        """(done, total), once it is known."""
        self.began = time.monotonic()
        self._next_line = self.began + FIRST_LINE_AFTER

    def progress(self, what: str, done: int, total: int) -> None:
        """Name the part that is worked on and how far it is."""
        self.what, self.done = single_line(what), (done, total)

    def __str__(self) -> str:
        count = f" {self.done[0]:,}/{self.done[1]:,}" if self.done else ""
        return f"{self.what}{count}, {duration(time.monotonic() - self.began)}"

    def line_due(self) -> bool:
        """Whether a log should have a line by now; true once for each line."""
        if time.monotonic() < self._next_line:
            return False
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        return True

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 1))
        cells: list[Text | ProgressBar] = [Text(str(self), style="dim")]
        if self.done:
            done, total = self.done
            cells.append(ProgressBar(total, done, width=BAR_CELLS, complete_style="cyan"))
        table.add_row(*cells)
        return table


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds != seconds or seconds in (float("inf"), float("-inf")):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days >= 2:
        return f"{days} days {hours_left} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
