"""Files that ship with the package."""

from pathlib import Path

from mlx_grpo.core.errors import InputError


def asset(name: str) -> Path:
    """A file that ships with the project: in the package, or in the checkout around it.

    Raises:
        InputError: neither is there.
    """
    package = Path(__file__).parent.parent
    for base in (package / "assets", package.parent):
        if (base / name).exists():
            return base / name
    raise InputError(f"{name}: not found beside the package; install mlx-grpo again")
