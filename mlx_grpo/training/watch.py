"""What is looked at between iterations: swap, heat, disk. Each is told once."""

import shutil
from pathlib import Path

from mlx_grpo.backend.pressure import speed_limit, swapped_bytes
from mlx_grpo.console.output import Console
from mlx_grpo.core.commands import command

SWAP_BYTES = 256 << 20
"""Swapped since the run began from which it counts; a machine swaps a little now and then."""
CHECKPOINTS_LEFT = 2
"""So many that still fit on the disk are worth a warning."""


def look_around(run: Path, ui: Console, swapped_before: int, peak: float, checkpoint: int) -> None:
    """Warn of what will slow the run down or end it.

    Args:
        swapped_before: bytes on the swap when the run began.
        peak: bytes that the iteration took at the most.
        checkpoint: bytes of one.
    """
    grown = swapped_bytes() - swapped_before
    if grown > SWAP_BYTES and ui.once(f"swap of {run}"):
        limit = f"{max(peak - grown, peak / 2) / 1e9:.1f}GB"
        less = command("mlx-grpo", "train", "--resume", "--output", run, "--memory-limit", limit)
        ui.warn(
            f"the machine swaps: {grown / 1e9:.1f} GB more than when the run began, which makes "
            "iterations several times slower. Close other programs, or stop with Ctrl-C and resume "
            f"with less memory: {less}"
        )
    if (speed := speed_limit()) < 100 and ui.once("heat"):
        ui.warn(
            f"the machine is hot and runs at {speed}% of its speed; give it air, or expect the run "
            "to take longer"
        )
    free = shutil.disk_usage(run).free
    if free < CHECKPOINTS_LEFT * checkpoint and ui.once(f"disk of {run}"):
        ui.warn(
            f"{run}: {free / 1e6:,.0f} MB free on its disk, and a checkpoint needs "
            f"{checkpoint / 1e6:,.0f} MB; free some before the run ends for it"
        )
