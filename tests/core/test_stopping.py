"""The first signal waits for a safe point, the second for nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_grpo.core.stopping import SIGNALS, StopRequested, never_stop, stop_signals


@pytest.fixture(autouse=True)
def hang_ups_are_heard() -> Iterator[None]:
    """Even where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_stops_at_the_next_safe_point(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with stop_signals() as safe_point:
        safe_point()
        os.kill(os.getpid(), number)
        for _ in range(2):  # and stays stopped
            with pytest.raises(StopRequested):
                safe_point()
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_another_thread_is_stopped_by_other_means_only() -> None:
    def stopped() -> bool:
        with stop_signals(lambda: True) as safe_point:
            try:
                safe_point()
            except StopRequested:
                return True
        return False

    before = [signal.getsignal(s) for s in SIGNALS]
    with ThreadPoolExecutor(1) as beside:
        assert beside.submit(stopped).result()
    assert [signal.getsignal(s) for s in SIGNALS] == before


@pytest.mark.parametrize("first", SIGNALS)
def test_a_hang_up_after_the_first_signal_does_not_end_the_saving(first: signal.Signals) -> None:
    with stop_signals() as safe_point:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGHUP)  # the terminal's, then the shell's, or systemd's
        with pytest.raises(StopRequested):
            safe_point()


def test_hang_ups_that_are_ignored_stay_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with stop_signals() as safe_point:
        os.kill(os.getpid(), signal.SIGHUP)
        safe_point()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_something_else_may_ask_for_a_stop() -> None:
    asked: list[int] = []
    with stop_signals(lambda: bool(asked)) as safe_point:
        safe_point()
        asked.append(1)
        with pytest.raises(StopRequested):
            safe_point()


def test_a_stage_on_its_own_never_stops() -> None:
    never_stop()


def test_the_second_signal_ends_the_process_in_the_middle_of_anything() -> None:
    busy = (
        "import os, re, signal\nfrom mlx_grpo.core.stopping import stop_signals\n"
        "with stop_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('asked once', flush=True)\n"
        "    re.match('(a+)+$', 'a' * 60 + 'b')\n"  # no Python handler would run in here
    )
    process = subprocess.Popen(
        [sys.executable, "-c", busy],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout
    assert process.stdout.readline() == "asked once\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
