"""Stopping on request: a signal sets a flag, and the stages look at it wherever they may be left.

What a stage did since its iteration began is given up; the trainer puts back what was there before.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SafePoint = Callable[[], None]
"""Called where a stage may be left; raises StopRequested if a stop was asked for."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the system's request to end, a terminal or an ssh connection that closes."""


class StopRequested(Exception):
    """A signal asked for a stop."""


def never_stop() -> None:
    """The safe point of a stage that nobody asks to stop."""


@contextmanager
def stop_signals(
    also: Callable[[], bool] = lambda: False, signals: Sequence[signal.Signals] = SIGNALS
) -> Iterator[SafePoint]:
    """The first of `signals` stops at the next safe point; a second one ends the process.

    The second is left to the operating system, which ends even a long call into MLX at once. That
    costs no more than the work since the last checkpoint: files are complete or absent. Not SIGHUP:
    a terminal that closes sends it, and then the shell once more.

    In another thread than the main one, which receives no signals, only `also` stops.

    Args:
        also: whether anything else asks for a stop.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for s in watched:
            signal.signal(s, signal.SIG_IGN if s == signal.SIGHUP else signal.SIG_DFL)

    def safe_point() -> None:
        if received or also():
            raise StopRequested

    # nohup and its like have hang-ups ignored: so it stays
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    here = threading.current_thread() is threading.main_thread()
    watched = [s for s in signals if here and not (ignored and s == signal.SIGHUP)]
    previous = {s: signal.signal(s, handle) for s in watched}
    try:
        yield safe_point
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
