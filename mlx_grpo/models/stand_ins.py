"""Stand-ins for the blocks of an mlx-lm model, to see and to steer what runs through it.

A model finds its blocks in lists of its modules and calls each once. `replaced` puts other
callables into these lists for a while.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.core.errors import InputError


@dataclass(frozen=True)
class Wire:
    """Stands in for what a block returns beside hidden states, on its way to later blocks."""

    block: int
    output: int


@dataclass(frozen=True)
class CacheWire:
    """Stands in for keys (part 0) or values (1) read from a cache for later blocks."""

    cache: Any
    part: int


class StandIn:
    """Calls the block it stands in for; models read attributes such as `use_sliding` off it and ask
    for its class."""

    def __init__(self, block: nn.Module):
        self.block = block

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["block"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__["block"][name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


Extra = tuple[bool, ...] | None
"""Whether each value that a block returns beside hidden states is one; None: it returns an array
and no tuple."""


class Probe(StandIn):
    """Notes the arguments of the block's calls and what it returns."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.given: list[dict[int | str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update(kwargs.items())
        self.given.append(given)
        self.returned = super().__call__(*args, **kwargs)
        return self.returned


@dataclass(frozen=True)
class Form:
    """How a block is called and what it returns."""

    place: int | str
    """Of hidden states among its arguments, by position or name."""
    extra: Extra


def forms_of(probes: Sequence[Probe]) -> list[Form]:
    """From one run of a model with probes. Hidden states are what the block before has returned;
    the first block is called like the second."""
    places: list[int | str] = []
    for before, probe in pairwise(probes):
        h = before.returned[0] if isinstance(before.returned, tuple) else before.returned
        given = probe.given[0]
        places.append(next((p for p, a in given.items() if a is h), next(iter(given))))
    places.insert(0, places[0] if places else next(iter(probes[0].given[0])))
    extras = [_extra(probe.returned) for probe in probes]
    return [Form(place, extra) for place, extra in zip(places, extras, strict=True)]


def _extra(returned: Any) -> Extra:
    if not isinstance(returned, tuple):
        return None
    return tuple(value is not None for value in returned[1:])


HIDDEN = object()
"""Stands for hidden states among recorded arguments."""


class Recorder(StandIn):
    """Notes the block's arguments and passes hidden states through."""

    def __init__(self, block: nn.Module, index: int, form: Form):
        super().__init__(block)
        self.index, self.form = index, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place, given = self.form.place, list(args)
        if isinstance(place, int):
            self.h, given[place] = given[place], HIDDEN
        else:
            self.h, kwargs[place] = kwargs[place], HIDDEN
        self.args, self.kwargs = tuple(given), kwargs
        self.h = mx.array(self.h)  # a model may write into what it gets back
        return self.returned(self.h)

    def returned(self, h: mx.array) -> Any:
        """Hidden states in the form in which the block returns them."""
        if self.form.extra is None:
            return h
        return (
            h,
            *(Wire(self.index, k) if is_one else None for k, is_one in enumerate(self.form.extra)),
        )


class Injector(Recorder):
    """Returns given hidden states instead of its input."""

    def __init__(self, block: nn.Module, index: int, form: Form, h: mx.array):
        super().__init__(block, index, form)
        self.given = h

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned(self.given)


class _Fp32Exit(StandIn):
    """Of the last block: what leaves it is fp32."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        if isinstance(out, tuple):
            return (out[0].astype(mx.float32), *out[1:])
        return out.astype(mx.float32)


class Evaluated(StandIn):
    """Of a block whose arrays are to be gone before the next one runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        mx.eval(out)
        return out


@dataclass(frozen=True)
class Places:
    """The lists in which a model finds its blocks."""

    names: tuple[str, ...]
    """Of the blocks, in the order in which they run."""
    lists: tuple[tuple[nn.Module, str, tuple[int | None, ...]], ...]
    """Module, attribute, and which block stands where (None: another module)."""


def family(model: nn.Module) -> str:
    """Name of mlx-lm's module, for messages."""
    return type(model).__module__.rsplit(".", 1)[-1]


def refusal(model: nn.Module, why: str) -> InputError:
    """That a model cannot be trained here, in a line."""
    return InputError(f"model type '{family(model)}' is not supported: {why}")


def quoted(error: Exception) -> str:
    """What a model's own code raised, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def places_of(model: nn.Module) -> Places:
    """Where the blocks are.

    Raises:
        InputError: a block is in no list of a module.
    """
    blocks = list(model.layers)
    numbers = {id(block): i for i, block in enumerate(blocks)}
    names: dict[int, str] = {}
    lists, seen = [], set()
    for name, module in model.named_modules():
        for key, value in module.items():
            if not isinstance(value, list) or id(value) in seen:
                continue
            where = tuple(numbers.get(id(item)) for item in value)
            if any(i is not None for i in where):
                seen.add(id(value))
                lists.append((module, key, where))
                prefix = f"{name}.{key}" if name else key
                names |= {i: f"{prefix}.{j}" for j, i in enumerate(where) if i is not None}
    if not blocks or len(names) < len(blocks):
        raise refusal(model, "its blocks are in no list of its modules")
    return Places(tuple(names[i] for i in range(len(blocks))), tuple(lists))


@contextmanager
def replaced(places: Places, stand_ins: Sequence[Any]) -> Iterator[None]:
    """Within it a stand-in is called for each block; without any, the blocks are not there."""
    originals = [(module, key, module[key]) for module, key, _ in places.lists]
    for (module, key, where), (_, _, original) in zip(places.lists, originals, strict=True):
        pairs = list(zip(where, original, strict=True))
        if stand_ins:
            module[key] = [own if i is None else stand_ins[i] for i, own in pairs]
        else:
            module[key] = [own for i, own in pairs if i is None]
    try:
        yield
    finally:
        for module, key, original in originals:
            module[key] = original


@contextmanager
def fp32_after_blocks(model: nn.Module) -> Iterator[None]:
    """Within it the final norm and the head of an mlx-lm model see fp32 states."""
    *others, last = model.layers
    with replaced(places_of(model), [*others, _Fp32Exit(last)]):
        yield


@contextmanager
def one_block_at_a_time(model: nn.Module) -> Iterator[None]:
    """Within it each block of an mlx-lm model is evaluated before the next: a GPU would have the
    arrays of many alive."""
    blocks = list(model.layers)
    with replaced(places_of(model), [Evaluated(block) for block in blocks]):
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it some families take kernels of a GPU that are fast and have no gradient."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
