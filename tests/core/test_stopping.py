"""The first signal waits for a safe point, the second for nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_grpo.core.stopping import SIGNALS, StopRequested, never_stop, stop_signals


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
