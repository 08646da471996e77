"""A Mac that does not fall asleep while there is work."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_grpo.backend import device


@contextmanager
def kept_awake(wanted: bool) -> Iterator[bool]:
    """Keep macOS from idle sleep while the block runs, by its `caffeinate`; gives whether it does.

    The child watches this process, so it ends with it however that ends. A lid that is closed still
    puts a MacBook to sleep.
    """
    program = shutil.which("caffeinate") if wanted and device.on_macos() else None
    if not program:
        yield False
        return
    nothing = subprocess.DEVNULL
    child = subprocess.Popen(
        [program, "-i", "-w", str(os.getpid())],
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,  # Ctrl-C is for us: the run is still to be saved
    )
    try:
        yield True
    finally:
        child.terminate()
        child.wait()
