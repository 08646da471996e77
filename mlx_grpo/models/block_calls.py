"""What the blocks of a decoder are given, and what travels between them beside hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.core.errors import InputError
from mlx_grpo.models.stand_ins import HIDDEN, CacheWire, Recorder, Wire

States = tuple[mx.array, ...]
"""Hidden states of a prompt, [1, S, D], and of its completions, [K, T, D], then the arrays of what
else travels from block to block."""
Kept = tuple[str, int, int]
"""What travels: ("output", block, which of its outputs) or ("cache", which cache, 0)."""
Pair = tuple[Any, Any]
"""Of the prompt and of the completions."""
_ARRAY = object()
"""Stands for an array in the form of a tree."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is given, with stand-ins among it that are exchanged for hidden states, caches
    and values."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: Any
    """The placeholder among the arguments."""
    number: int | None
    """Which of the model's caches it stands for; None: the block takes none."""
    caches: tuple[Any, ...]
    """All placeholders."""

    @classmethod
    def of(cls, recorder: Recorder, caches: Sequence[Any]) -> "BlockCall":
        """From what a recorder has noted."""
        given = [*recorder.args, *recorder.kwargs.values()]
        found = [n for n, c in enumerate(caches) if any(c is a for a in given)]
        number = found[0] if found else None
        cache = None if number is None else caches[number]
        return cls(tuple(recorder.args), recorder.kwargs, cache, number, tuple(caches))

    def reads(self) -> list[Kept]:
        """Outputs of earlier blocks, and its cache."""
        given = [*self.args, *self.kwargs.values()]
        wired = [self._kept(a) for a in given if isinstance(a, Wire | CacheWire)]
        return wired + ([] if self.number is None else [("cache", self.number, 0)])

    def _kept(self, wire: Wire | CacheWire) -> Kept:
        if isinstance(wire, Wire):
            return "output", wire.block, wire.output
        return "cache", next(n for n, c in enumerate(self.caches) if c is wire.cache), 0

    def run(self, block: nn.Module, h: mx.array, cache: Any, values: dict[Kept, Any]) -> list[Any]:
        """Everything that the block returns, hidden states first."""

        def real(a: Any) -> Any:
            if a is HIDDEN:
                return h
            if isinstance(a, Wire):
                return values[self._kept(a)]
            if isinstance(a, CacheWire):
                return values[self._kept(a)][a.part]
            return cache if self.number is not None and a is self.cache else a

        kwargs = {name: real(a) for name, a in self.kwargs.items()}
        out = block(*map(real, self.args), **kwargs)
        return list(out) if isinstance(out, tuple) else [out]


def travelling(calls: Sequence[BlockCall]) -> list[tuple[Kept, ...]]:
    """What travels into each block: made by an earlier block, read by this or a later one."""
    made: dict[Kept, int] = {}
    last: dict[Kept, int] = {}
    for i, call in enumerate(calls):
        for kept in call.reads():
            made.setdefault(kept, kept[1] if kept[0] == "output" else i)
            last[kept] = i
    return [tuple(k for k in made if made[k] < i <= last[k]) for i in range(len(calls))]


@dataclass(frozen=True)
class Embedded:
    """Hidden states entering the first block, and the arguments of every block."""

    h_prompt: mx.array
    h_rows: mx.array
    lengths: tuple[int, int]
    """Tokens of the prompt and of the completions."""
    prompt_calls: list[BlockCall]
    row_calls: list[BlockCall]
    travelling: list[tuple[Kept, ...]]
    """Into each block."""
    forms: dict[Kept, Pair] = field(default_factory=dict)
    """How what travels is put together: its tree, and the parts without a gradient."""

    def pack(self, i: int, values: dict[Kept, Pair]) -> list[mx.array]:
        """The arrays of what travels into block `i`."""
        arrays: list[mx.array] = []
        for kept in self.travelling[i]:
            forms = []
            for value in values[kept]:
                leaves = tree_flatten(value)
                arrays += [v for _, v in leaves if _has_gradient(v)]
                forms.append([(path, _ARRAY if _has_gradient(v) else v) for path, v in leaves])
            self.forms[kept] = (forms[0], forms[1])
        return arrays

    def unpack(self, i: int, arrays: Sequence[mx.array]) -> dict[Kept, Pair]:
        """What travels into block `i`, from its arrays."""
        rest = iter(arrays)

        def whole(form: list[tuple[str, Any]]) -> Any:
            return tree_unflatten([(p, next(rest) if v is _ARRAY else v) for p, v in form])

        return {
            kept: (whole(self.forms[kept][0]), whole(self.forms[kept][1]))
            for kept in self.travelling[i]
        }


def _has_gradient(value: Any) -> bool:
    if not isinstance(value, mx.array | str | int | float | None):
        raise InputError(f"its blocks hand on a {type(value).__name__}")
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
