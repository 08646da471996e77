"""A word to a person who looks elsewhere: a notification, else the terminal's bell."""

import shutil
import subprocess

from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import single_line

TITLE = "mlx-grpo"
SCRIPT = (
    *("-e", "on run argv"),
    *("-e", "display notification (item 1 of argv) with title (item 2 of argv)"),
    *("-e", "end run"),
)
"""The text is an argument of the script, no part of it: it may hold anything."""
SECONDS = 10


def notify(ui: Console, text: str) -> None:
    """Show a notification, by `osascript` on macOS or `notify-send` on Linux; where neither works,
    ring the bell."""
    text = single_line(text)
    shown = _runs("osascript", *SCRIPT, text, TITLE) or _runs("notify-send", "--", TITLE, text)
    if not shown:
        ui.ring()


def _runs(program: str, *arguments: str) -> bool:
    if not (path := shutil.which(program)):
        return False
    try:
        done = subprocess.run([path, *arguments], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
