"""Runs that are interrupted in a given iteration."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_grpo.training import loop


@contextmanager
def interrupted_in(iteration: int) -> Iterator[None]:
    """Within it Ctrl-C comes at the beginning of an iteration, counted from 1 as they are done."""
    real, calls = loop.iterate, []

    def iterate(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == iteration:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "iterate", iterate)
        yield
