"""Stopping on request: a signal sets a flag, and the stages look at it wherever they may be left.

What a stage did since its iteration began is given up; the trainer puts back what was there before.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SafePoint = Callable[[], None]
"""Called where a stage may be left; raises StopRequested if a stop was asked for."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """A signal asked for a stop."""


def never_stop() -> None:
    """The safe point of a stage that nobody asks to stop."""


@contextmanager
def stop_signals() -> Iterator[SafePoint]:
    """The first SIGINT or SIGTERM stops at the next safe point; a second one ends the process.

    The second is left to the operating system, which ends even a long call into MLX at once. That
    costs no more than the work since the last checkpoint: files are complete or absent.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for s in SIGNALS:
            signal.signal(s, signal.SIG_DFL)

    def safe_point() -> None:
        if received:
            raise StopRequested

    previous = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield safe_point
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
