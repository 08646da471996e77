"""How hard-pressed the machine is: what it has swapped out, and whether heat slows it down."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from mlx_grpo.backend import device

STATUS = Path("/proc/self/status")
SECONDS = 5
"""A program that tells of the machine may take; they take hundredths."""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def swapped_bytes() -> int:
    """Bytes on the swap: of this process on Linux; on macOS of all of them, for it does not tell
    them apart; 0 where it is not known."""
    if device.on_macos():
        return swap_used(_told("sysctl", "-n", "vm.swapusage"))
    return process_swap(STATUS.read_text()) if STATUS.exists() else 0


def speed_limit() -> int:
    """Percent of its speed at which a Mac runs for the heat's sake; 100 where nothing is known."""
    return thermal_limit(_told("pmset", "-g", "therm")) if device.on_macos() else 100


def swap_used(told: str) -> int:
    """Bytes of `total = 2048.00M  used = 512.25M  free = ...`, as sysctl prints it."""
    found = re.search(r"used = (\d+(?:\.\d+)?)([KMG])", told)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def process_swap(status: str) -> int:
    """Bytes of the line `VmSwap:  1234 kB` of /proc/PID/status."""
    found = re.search(r"^VmSwap:\s+(\d+) kB$", status, re.M)
    return int(found[1]) << 10 if found else 0


def thermal_limit(told: str) -> int:
    """Percent of the line `CPU_Speed_Limit = 63` of `pmset -g therm`; Apple silicon often has no
    such line."""
    found = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", told)
    return int(found[1]) if found else 100


def _told(*command: str) -> str:
    """What a program prints; nothing where there is no such program, or it fails."""
    if not (program := shutil.which(command[0])):
        return ""
    plain = {**os.environ, "LC_ALL": "C"}  # elsewhere it writes 512,25M
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=SECONDS, env=plain
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""
