"""All that is shown: rich on a terminal, plain lines otherwise. The only place that prints."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_grpo.console.columns import Growing, Piece, side_by_side
from mlx_grpo.console.doing import SECONDS_BETWEEN_LINES, Doing, duration
from mlx_grpo.console.live import LiveView
from mlx_grpo.console.stream import Stream
from mlx_grpo.console.wrapping import in_columns, wrapped
from mlx_grpo.core.errors import single_line, visible
from mlx_grpo.core.types import Group

REFRESHES_PER_SECOND = 2  # drawing shares the processor with the training
REDRAWN_TEXTS = 8
"""Times a second, where people read along."""
SAMPLES = 3
LONGEST_CELL = 160
HANGING = 2
"""Blanks before the further lines of a warning."""
LEAST_TEXT = 12
"""Cells below which a column of texts cannot be read."""


class Console:
    """Where the program speaks. `quiet` leaves warnings and errors only.

    What others wrote (prompts, answers, names, complaints) is shown with its control characters
    spelled out: none of it can steer the terminal.
    """

    def __init__(self, quiet: bool = False):
        self._stdout = Stream("stdout")
        self.out = _rich(self._stdout, quiet)
        self.err = _rich(Stream("stderr"))
        self._muted = self._shared = False
        self._live: Live | None = None
        self._view: LiveView | None = None
        self._doing: Doing | None = None
        self._last_line = float("-inf")
        self.run = (1, 1)
        """Which of how many runs that follow one another this is."""
        self._said: set[str] = set()

    @property
    def reader_gone(self) -> bool:
        """Whether nobody reads standard output any more, as under `| head`, or after a hang-up."""
        return self._stdout.gone

    def mute(self) -> None:
        """Errors only from here on: another process says the rest."""
        self.out.quiet = self._muted = True

    def share_errors(self) -> None:
        """Warnings and errors begin on a line of their own from here on: another library writes
        its lines to standard error in pieces, from threads of its own, and ours may fall between
        two of them."""
        self._shared = True

    def next_run(self, position: int, total: int, name: str) -> None:
        """From here on it is this run of so many."""
        self.run = (position, total)
        if total > 1:
            self.say(f"run {position} of {total}: {name}")

    def ring(self) -> None:
        """The terminal's bell; nothing elsewhere."""
        self.out.bell()

    def once(self, what: str) -> bool:
        """True the first time it is asked."""
        new = what not in self._said
        self._said.add(what)
        return new

    def say(self, text: str) -> None:
        """One line, or several."""
        lines = visible(text, keep="\n").split("\n")
        self._print(self.out, Text("\n".join(_fitted(self.out, wrapped, line) for line in lines)))

    def warn(self, text: str) -> None:
        """One line on standard error."""
        if not self._muted:
            self._tell(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """One line on standard error."""
        self._tell(f"error: {text}", "red")

    def relay(self, text: str) -> None:
        """A line that another program printed, for standard error."""
        if not self._muted:
            self._tell(text, "")

    def _tell(self, text: str, style: str) -> None:
        # while a picture is drawn on the terminal, only its own console writes around it
        drawn = self._live and self.err.is_terminal
        console, start = (self.out if drawn else self.err), "\n" * self._shared
        line = _fitted(console, _hanging, single_line(text))
        self._print(console, Text(start + line, style=style))  # in one write

    def _print(self, console: RichConsole, what: RenderableType, **how: Any) -> None:
        # rich reads how high the picture is before it prints and draws it anew afterwards: were its
        # own thread to draw a higher one between the two, a piece of that would stay
        with self._live._lock if self._live else nullcontext():
            console.print(what, **how)

    @contextmanager
    def training(self, total: int, before: Sequence[dict[str, Any]] = ()) -> Iterator[None]:
        """The live view of a run of `total` iterations while the block runs, where it can be drawn;
        elsewhere `iteration` says a line each. `before` are the rows that a resumed run has in
        its metrics.jsonl.

        A reader that goes away ends no block: see `reader_gone`.
        """
        self._stdout.patient = True
        try:
            if not self._draws or self.out.options.ascii_only:
                yield
                return
            self._view = LiveView(total, self.run, before)
            with self._drawing(self._view):
                try:
                    yield
                finally:
                    self.end_view()
        finally:
            self._stdout.patient = False

    def end_view(self) -> None:
        """Draw the live view, if there is one, for the last time: what is said from here on stands
        below it."""
        if self._view and self._live:
            self._view.doing = None
            self._live.stop()
            self._live = self._view = None
            self.out.print()

    @contextmanager
    def _drawing(
        self, picture: RenderableType, transient: bool = False, per_second: int | None = None
    ) -> Iterator[None]:
        """Keep the picture below all that is printed while the block runs."""
        self._live = Live(
            picture,
            console=self.out,
            refresh_per_second=per_second or REFRESHES_PER_SECOND,
            transient=transient,
            redirect_stderr=self.err.is_terminal,  # an error log in a file stays there
        )
        try:
            with self._live:
                yield
        finally:
            self._live = None

    @contextmanager
    def stage(self, step: int, name: str) -> Iterator[None]:
        """The block is this stage of iteration `step`."""
        if self._view:
            with self._view.stage(step, name):
                yield
        elif self._draws or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            with self.working(f"{step}: {name}"):
                yield
        else:  # a log has a line of the iteration itself
            yield

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """The block may take long: a spinner with a clock on a terminal, elsewhere a line."""
        outer, self._doing = self._doing, Doing(what)
        try:
            if self._view:
                self._view.doing = self._doing
                yield
            elif self._draws:
                with self._spinning(self._doing) if not outer else nullcontext():
                    yield
            else:
                self._note(what)
                yield
        finally:
            self._doing = outer

    def _spinning(self, doing: Doing) -> AbstractContextManager[None]:
        kind = "line" if self.out.options.ascii_only else "dots"
        return self._drawing(Spinner(kind, doing, style="status.spinner"), transient=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far `working` is: beside the spinner; elsewhere a line every now and then."""
        if not self._doing:
            return
        self._doing.progress(what, done, total)
        if not self._draws and self._doing.line_due():
            self._note(str(self._doing))

    def _note(self, text: str) -> None:
        if not self._draws:
            self._last_line = time.monotonic()
            self.say(f"      {text}")

    @property
    def _draws(self) -> bool:
        """Whether something on the screen can be changed later."""
        shown = self.out.is_terminal and not self.out.quiet
        return shown and not self.out.is_dumb_terminal

    def iteration(self, metrics: dict[str, Any], total: int) -> None:
        """A training iteration: in the live view, or as a line."""
        if self._view:
            self._view.history.append(metrics)
            return
        m = metrics
        held = f"beta {m['kl/beta']:.3g}" if m["kl/beta"] else f"decay {m['kl/decay']:.2f}"
        line = (
            f"{m['step']:>4}/{total}  reward {m['reward']:+.3f}  kl "
            f"{m['kl']:.4f}/{m['kl/target']:.3g}  "
            f"{held}  clip {m['clip_ratio/region_mean']:.3f}  "
            f"length {m['completions/mean_length']:.0f}  cut off "
            f"{m['completions/clipped_ratio']:.0%}  "
            f"dead {m['frac_dead_groups']:.0%}  {m['time/tokens_per_second']:.0f} tok/s  "
            f"{m['memory/peak'] / 1e9:.2f} GB  {m['time/iteration']:.1f} s  left "
            f"{duration(m['time/left'])}"
        )
        self.say(line)

    def evaluation(self, step: int, metrics: dict[str, Any], note: str) -> None:
        """One line for an evaluation."""
        if self._view:
            self._view.doing = Doing("saving")
        line = (
            f"{step:>4}  held-out: reward {metrics['eval_reward']:+.3f}  kl "
            f"{metrics['eval_kl']:.4f}  "
            f"perplexity {metrics['eval_perplexity']:.2f}  length "
            f"{metrics['eval_completions/mean_length']:.0f}  "
            f"cut off {metrics['eval_completions/clipped_ratio']:.0%}  {note}"
        )
        self._print(self.out, Text(_fitted(self.out, in_columns, visible(line))))

    def samples(
        self, step: int, groups: Sequence[Group], raw_PK: Sequence[Sequence[float]]
    ) -> None:
        """The best, the middle and the worst answer of an iteration; in the live view only."""
        if not self._view:
            return
        answers = [
            (reward, group.prompt.messages[-1]["content"], c.text)
            for group, rewards in zip(groups, raw_PK, strict=True)
            for c, reward in zip(group.completions, rewards, strict=True)
        ]
        answers.sort(key=lambda a: -a[0])
        picked = [answers[i * (len(answers) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)]
        rows = [(f"{reward:+.2f}", _cut(prompt), _cut(text)) for reward, prompt, text in picked]
        self.table(f"Answers of iteration {step}", ("reward", "prompt", "answer"), rows, lines=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: bool = False
    ) -> None:
        """A small table; the first column is a label. Where it does not fit, a line per cell."""
        columns = list(map(single_line, columns))
        rows = [[visible(cell, keep="\n") for cell in row] for row in rows]
        needed = _least_width(columns, rows, lines)
        if needed > self.out.width and self.out.is_terminal:
            self._list(title, columns, rows)
            return
        # a file has no width, but rich prints nothing wider than what it takes that to be
        width = needed if needed > self.out.width else None
        table = Table(title=_text(title), title_justify="left", show_lines=lines, width=width)
        for i, column in enumerate(columns):
            table.add_column(
                _text(column),
                justify="left" if i == 0 or lines else "right",
                overflow="fold",
                no_wrap=i == 0 and not lines,  # a path can be copied from the table
            )
        for row in rows:
            table.add_row(*map(Text, row))
        self._print(self.out, table, soft_wrap=False, crop=False)

    def side_by_side(self, title: str, pieces: Sequence[Piece]) -> None:
        """Texts under their labels, beside one another on a terminal that has room for it; in a
        file one after the other."""
        if title:
            self._print(self.out, Text(_fitted(self.out, _hanging, single_line(title)), "cyan"))
        if self.out.is_terminal:
            for table in side_by_side(pieces, self.out.width):
                self._print(self.out, table, soft_wrap=False)
        else:  # a file has no width
            for label, text in pieces:
                shown = visible(text.strip(), keep="\n")
                self._print(self.out, Text(f"{single_line(label)}\n{shown}"))
        self._print(self.out, Text())

    @contextmanager
    def growing(self, title: str, labels: Sequence[str]) -> Iterator[list[str]]:
        """Texts that the block adds to, drawn side by side meanwhile where that is possible; in the
        end they are printed, if there is anything."""
        texts = [""] * len(labels)
        picture = Growing(labels, texts)
        try:
            drawing = self._drawing(picture, True, REDRAWN_TEXTS) if self._draws else nullcontext()
            with drawing:
                yield texts
        finally:
            if any(texts):
                self.side_by_side(title, picture.pieces)

    def _list(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._print(self.out, Text(single_line(title), style="table.title"))
        for first, *rest in rows:
            self._print(self.out, Text(f"{columns[0]} {first}".strip(), style="bold"))
            for column, cell in zip(columns[1:], rest, strict=True):
                if cell:
                    self._print(self.out, Text(f"  {column}: {cell}"))


def _rich(stream: Stream, quiet: bool = False) -> RichConsole:
    file = cast(TextIO, stream)
    return RichConsole(file=file, highlight=False, soft_wrap=True, quiet=quiet)


def _fitted(console: RichConsole, how: Callable[[str, int], str], line: str) -> str:
    """The line as a terminal has room for it; elsewhere as it is."""
    return how(line, console.width) if console.is_terminal else line


def _hanging(text: str, width: int) -> str:
    return wrapped(text, width, HANGING)


def _text(text: str) -> Text:
    return Text(single_line(text))


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]], lines: bool) -> int:
    """Cells that a table needs to break no word, or in tables of texts to leave each some room."""
    total = 1
    for i, column in enumerate(columns):
        cells = [column, *(row[i] for row in rows)]
        words = cells if i == 0 and not lines else " ".join(cells).split()
        longest = max(map(cell_len, words), default=0)
        total += 3 + (min(longest, LEAST_TEXT) if lines else longest)
    return total


def _cut(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_CELL else f"{words[:LONGEST_CELL]}…"
