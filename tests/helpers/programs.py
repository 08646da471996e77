"""Stand-ins for programs that this machine does not have."""

import os
from pathlib import Path

import pytest


def stand_in(directory: Path, patch: pytest.MonkeyPatch, name: str, script: str) -> Path:
    """A shell script of this name, found before all others of that name."""
    program = directory / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    if str(directory) not in os.environ["PATH"].split(os.pathsep):
        patch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return program
