"""Questions to a person at the terminal, or to a pipe that holds the answers."""

import contextlib
import sys
from io import TextIOWrapper


def at_a_terminal() -> bool:
    """Whether a person types, and sees what is printed."""
    return bool(sys.stdin) and sys.stdin.isatty() and sys.stdout.isatty()


def ask(prompt: str) -> str | None:
    """What is typed behind the prompt, or the next line of a pipe; None where there is no more,
    after Ctrl-D or Ctrl-C."""
    if sys.stdin is None:
        return None
    if isinstance(sys.stdin, TextIOWrapper) and sys.stdin.errors != "replace":
        sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 is no reason to end
    if not at_a_terminal():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and called back)
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None
