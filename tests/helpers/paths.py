"""Where the checkout is."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = f"{ROOT / 'tests' / 'helpers' / 'without_torch'}{os.pathsep}{ROOT}"
"""PYTHONPATH of a process that has the checkout and finds no torch."""
