"""A Mac is kept awake while there is work; stand-ins take the place of macOS's programs."""

import os
import time
from pathlib import Path

import pytest

from mlx_grpo.backend import device
from mlx_grpo.backend.awake import kept_awake
from mlx_grpo.backend.pressure import (
    process_swap,
    speed_limit,
    swap_used,
    swapped_bytes,
    thermal_limit,
)
from tests.helpers.programs import stand_in


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_macos", lambda: True)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_caffeinate_watches_this_process_and_ends_with_the_block(
    mac: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        tmp_path,
        monkeypatch,
        "caffeinate",
        'echo "$$ $@" > told.tmp; mv told.tmp told; exec sleep 60',
    )
    monkeypatch.chdir(tmp_path)
    with kept_awake(True) as awake:
        assert awake
        for _ in range(1000):
            if (tmp_path / "told").exists():
                break
            time.sleep(0.01)
        child, *flags = (tmp_path / "told").read_text().split()
        assert flags == ["-i", "-w", str(os.getpid())] and alive(int(child))
    assert not alive(int(child))


def test_nothing_is_started_where_it_is_not_wanted_or_no_mac(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "caffeinate", f"touch {tmp_path / 'told'}")
    monkeypatch.setattr(device, "on_macos", lambda: False)
    with kept_awake(True) as awake:
        assert not awake
    monkeypatch.setattr(device, "on_macos", lambda: True)
    with kept_awake(False) as awake:
        assert not awake
    assert not (tmp_path / "told").exists()


def test_swap_and_heat_are_read_as_a_mac_tells_them(
    mac: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = "total = 2048.00M  used = 512.25M  free = 1535.75M  (encrypted)"
    stand_in(
        tmp_path,
        monkeypatch,
        "sysctl",
        f'test "$LC_ALL $*" = "C -n vm.swapusage" && echo "{usage}"',
    )
    stand_in(
        tmp_path, monkeypatch, "pmset", 'test "$*" = "-g therm" && echo " CPU_Speed_Limit  = 63"'
    )
    assert (swapped_bytes(), speed_limit()) == (int(512.25 * 2**20), 63)
    monkeypatch.setenv("PATH", "")
    assert (swapped_bytes(), speed_limit()) == (0, 100)


def test_what_tells_nothing_is_no_pressure() -> None:
    assert swap_used("") == process_swap("VmRSS: 4 kB\n") == 0
    assert process_swap("VmRSS:\t 4 kB\nVmSwap:\t    1234 kB\n") == 1234 * 1024
    note = "Note: No thermal warning level has been recorded\n"
    assert (thermal_limit(note), thermal_limit("CPU_Speed_Limit \t= 100")) == (100, 100)
    assert swapped_bytes() >= 0 and speed_limit() == 100  # of this machine
