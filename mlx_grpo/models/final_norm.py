"""Find the norm behind the last block of a model: what a reward head reads is what it returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.models.stand_ins import Places, replaced


@dataclass(frozen=True)
class FinalNorm:
    """A norm and its place in the model."""

    owner: nn.Module
    name: str
    module: nn.Module

    @contextmanager
    def noted(self) -> Iterator[list[mx.array]]:
        """Within it what the norm reads is appended to a list."""
        read: list[mx.array] = []

        def note(x: mx.array) -> mx.array:
            read.append(x)
            return self.module(x)

        with _called_instead(self, note):
            yield read

    @contextmanager
    def reading(self, h_BTD: mx.array) -> Iterator[None]:
        """Within it the norm reads the given states, whatever it is given."""
        with _called_instead(self, lambda _: self.module(h_BTD)):
            yield


def final_norm(model: nn.Module, places: Places, stand_ins: Sequence[Any]) -> FinalNorm | None:
    """The last norm outside of the blocks that the model calls; None: it calls no module for it."""
    with replaced(places, []):
        spots = [
            FinalNorm(owner, name, child)
            for _, owner in model.named_modules()
            for name, child in owner.items()
            if isinstance(child, nn.Module) and "norm" in type(child).__name__.lower()
        ]
    called: list[FinalNorm] = []

    def spy(spot: FinalNorm) -> Callable[..., mx.array]:
        def call(*args: Any) -> mx.array:
            called.append(spot)
            return spot.module(*args)

        return call

    with replaced(places, stand_ins):
        for spot in spots:
            spot.owner[spot.name] = spy(spot)
        try:
            model(mx.zeros((1, 1), mx.int32))
        finally:
            for spot in spots:
                spot.owner[spot.name] = spot.module
    return called[-1] if called else None


@contextmanager
def _called_instead(norm: FinalNorm, stand_in: Callable[[mx.array], mx.array]) -> Iterator[None]:
    norm.owner[norm.name] = stand_in
    try:
        yield
    finally:
        norm.owner[norm.name] = norm.module
