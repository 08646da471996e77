"""Few open files are enough: mlx-lm asks for more at its import and fails where the system has a
lower limit."""

import resource
import sys

ASKED = (resource.RLIMIT_NOFILE, (2048, 4096))
"""What `mlx_lm.utils` sets, to the letter (mlx-lm 0.32)."""


def allow_few() -> None:
    """Let mlx-lm's call set what this system allows; call it before mlx-lm is imported."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= ASKED[1][1] or "mlx_lm.utils" in sys.modules:
        return
    real = resource.setrlimit

    def within(kind: int, limits: tuple[int, int]) -> None:
        if (kind, limits) != ASKED:
            real(kind, limits)
            return
        resource.setrlimit = real
        real(kind, (min(limits[0], most), most))

    resource.setrlimit = within
