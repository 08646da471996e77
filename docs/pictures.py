"""Make the pictures in docs/img: a run on a terminal, its report, and the report of three seeds.

usage: python -m docs.pictures [terminal] [report] [seeds]

Everything is real. `terminal` trains a run in a shell on a pseudo-terminal, stops it with Ctrl-C
and resumes it; it needs weights/ (`make demo`) and about ten minutes of two idle CPU cores.
`report` shows that run's report, and `seeds` the report of the reference experiment, whose runs
`python -m bench.learning.experiment` has left. Both need Chromium. Without a name, all three.
"""

import html
import io
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_grpo.report.write import write_report
from tests.helpers.browser import browser
from tests.helpers.terminal import ROOT, Terminal

IMAGES = ROOT / "docs" / "img"
RUN = Path("runs/pictures/seed-42")
SEEDS = Path("runs/experiment/decay")
TRAIN = "mlx-grpo train --config docs/pictures.toml"
SHOWN_AT, STOPPED_AT = 6, 8
"""The evaluation that is shown with its warnings; the iteration in which Ctrl-C is pressed."""
DESKTOP, PHONE = 1280, 390
COLOURS = {
    "default": "#dfe3ea",
    "red": "#e0656f",
    "green": "#7fb26b",
    "brown": "#d9a94a",  # what pyte calls yellow
    "cyan": "#56b3c4",
    "brightblack": "#8a919c",
}
CELL, LINE, EDGE = 8.4, 17, 14
"""Width and height of a character, and the margin, in pixels."""
STYLE = 'font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace'

NO_BREAK = "\N{NO-BREAK SPACE}"
"""SVG joins blanks that follow one another, but not these."""


def screen_svg(screen: Any) -> str:
    """The screen as it is now, with its colours; without the empty lines at its end."""
    used = max(y for y, line in enumerate(screen.display) if line.strip()) + 1
    width, height = screen.columns * CELL + 2 * EDGE, used * LINE + 2 * EDGE
    shown = [text for y in range(used) for text in _line(screen.buffer[y], y, screen.columns)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" style=\'{STYLE}\'>\n'
        '<rect width="100%" height="100%" rx="8" fill="#1c2027"/>\n'
        + "\n".join(shown)
        + "\n</svg>\n"
    )


def _line(cells: Any, y: int, columns: int) -> Iterator[str]:
    """A text for each stretch of a line that looks alike; a fixed length keeps it in its cells."""
    runs = groupby(range(columns), key=lambda x: (cells[x].fg, cells[x].bold))
    for (colour, bold), places in runs:
        x, *rest = places
        text = "".join(cells[place].data for place in (x, *rest)).rstrip()
        x += len(text) - len(text.lstrip())
        if not (text := text.lstrip()):
            continue
        look = f'fill="{COLOURS.get(colour, "#" + colour)}"' + " font-weight='bold'" * bold
        yield (
            f'<text x="{EDGE + x * CELL:g}" y="{EDGE + (y + 0.75) * LINE:g}" '
            f'textLength="{len(text) * CELL:g}" lengthAdjust="spacingAndGlyphs" '
            f"{look}>{html.escape(text).replace(' ', NO_BREAK)}</text>"
        )


def picture_of_screen(shell: Terminal, name: str) -> None:
    """Write what a terminal shows as docs/img/NAME.svg."""
    (IMAGES / f"{name}.svg").write_text(screen_svg(shell.screen), encoding="utf-8")


def picture_of_page(
    chromium: Any, report: Path, name: str, width: int, last: str, scheme: str = "light"
) -> None:
    """Write a report down to the first element `last` as docs/img/NAME.png."""
    page = chromium.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page.goto(report.resolve().as_uri())
    box = page.locator(last).first.bounding_box()
    shown = {"x": 0, "y": 0, "width": width, "height": box["y"] + box["height"] + 16}
    taken = page.screenshot(full_page=True, clip=shown)
    page.close()
    # 256 colours are enough, in a third of the bytes
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(256).save(
        IMAGES / f"{name}.png", optimize=True
    )


def terminal(command: str = TRAIN, run: Path = RUN) -> None:
    """Train, stop and resume a run in a shell, with a picture of each."""
    shutil.rmtree(run, ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = Terminal(["bash", "--norc", "--noprofile"], PS1="$ ", PATH=path)
    try:
        shell.until("$")
        shell.send(f"{command} --output {run}\n".encode())
        shell.until_shown("1: rollout")
        picture_of_screen(shell, "terminal-start")
        shell.until_shown(f"{SHOWN_AT}  held-out")
        shell.until_shown(f"{SHOWN_AT + 1}: rollout")
        picture_of_screen(shell, "terminal-warning")
        shell.until_shown(f"{STOPPED_AT}: rollout ━━━")
        shell.send(b"\x03")
        shell.until_shown("resume with")
        shell.until_shown("\n$ ")
        shell.send(f"mlx-grpo train --resume --output {run}\n".encode())
        shell.until_shown(f"{STOPPED_AT}: rollout")
        picture_of_screen(shell, "terminal-resume")
        shell.until("done: ")
        shell.send(b"exit\n")
        assert shell.end() == 0
    finally:
        shell.kill()


def report(chromium: Any) -> None:
    """Pictures of the report of that run."""
    page = write_report([RUN])
    picture_of_page(chromium, page, "report", DESKTOP, "figure")
    picture_of_page(chromium, page, "report-dark", DESKTOP, "figure", "dark")


def seeds(chromium: Any) -> None:
    """Pictures of the report of the experiment's seeds."""
    page = write_report(sorted(SEEDS.glob("seed-*")))
    picture_of_page(chromium, page, "report-seeds", DESKTOP, "figure")
    picture_of_page(chromium, page, "report-seeds-phone", PHONE, "section[aria-label=Warnings]")


def main() -> None:
    os.chdir(ROOT)  # paths in the pictures are as a user of the checkout sees them
    IMAGES.mkdir(exist_ok=True)
    pages = {"report": report, "seeds": seeds}
    asked = sys.argv[1:] or ["terminal", *pages]
    if unknown := set(asked) - {"terminal", *pages}:
        sys.exit(f"{min(unknown)}: must be terminal, report or seeds")
    if "terminal" in asked:
        terminal()
    if of_pages := [name for name in pages if name in asked]:
        with browser() as chromium:
            for name in of_pages:
                pages[name](chromium)


if __name__ == "__main__":
    main()
