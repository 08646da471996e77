"""Texts side by side: as many as a terminal has room for, the others below them."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mlx_grpo.core.errors import single_line, visible

LEAST_COLUMN = 30
"""Cells below which a text reads better under another than beside it."""
GAP = 2
SIDES = 6
"""Texts beside one another at most."""
Piece = tuple[str, str]
"""(what stands above a text, the text)."""


def side_by_side(pieces: Sequence[Piece], width: int) -> list[Table]:
    """Tables without lines, each a row of texts under their labels; labels and texts may hold
    anything."""
    fitting = max(1, min(SIDES, (width + GAP) // (LEAST_COLUMN + GAP)))
    rows = -(-len(pieces) // fitting)
    a_row = -(-len(pieces) // rows)  # four texts where three fit: two and two
    return [_row(pieces[i : i + a_row], a_row) for i in range(0, len(pieces), a_row)]


class Growing:
    """The picture of texts to which something is added all the time."""

    def __init__(self, labels: Sequence[str], texts: Sequence[str]):
        self._labels, self._texts = labels, texts

    @property
    def pieces(self) -> list[Piece]:
        """As they are now."""
        return list(zip(self._labels, self._texts, strict=True))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from side_by_side(self.pieces, options.max_width)


def _row(pieces: Sequence[Piece], columns: int) -> Table:
    table = Table.grid(padding=(0, GAP), expand=True)
    for _ in range(columns):
        table.add_column(ratio=1, overflow="fold")
    empty = [Text()] * (columns - len(pieces))
    table.add_row(*(Text(single_line(label), style="bold") for label, _ in pieces), *empty)
    table.add_row(*(Text(visible(text.strip(), keep="\n")) for _, text in pieces), *empty)
    return table
