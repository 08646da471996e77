"""Run a decoder whose weights stay on disk: one block in memory at a time.

Embed first, then run the blocks. A block is read, brought into its precision, run over all rows and
let go before the next one is read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_map_with_path

from mlx_grpo.backend.own_dtypes import may_cast
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.models.block_calls import Embedded, States
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.stand_ins import Evaluated, places_of, replaced


@dataclass
class Rows:
    """Rows behind one prompt, on their way through the blocks."""

    embedded: Embedded
    states: States
    """Of the prompt, of the rows, and what else travels."""


def embed_rows(decoder: Decoder, prompt_1S: mx.array, rows_KT: mx.array) -> Rows:
    """The hidden states that enter the first block, evaluated."""
    e = decoder.embed(prompt_1S, rows_KT)
    mx.eval(e.h_prompt, e.h_rows)
    return Rows(e, (e.h_prompt, e.h_rows))


def run_blocks(decoder: Decoder, rows: Sequence[Rows], precision: Precision) -> None:
    """Move all rows behind the last block."""
    castable = may_cast(decoder.model)
    for i, block in enumerate(decoder.blocks):
        apply_precision(block, precision, castable)
        for r in rows:
            r.states = decoder.run_block(r.embedded, i, *r.states)
            mx.eval(r.states)
        let_go(block)


class _Read(Evaluated):
    """Reads a block when it is called, and lets it go."""

    def __init__(self, block: nn.Module, precision: Precision, castable: Callable[[str], bool]):
        super().__init__(block)
        self.form = precision, castable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        apply_precision(self.block, *self.form)
        out = super().__call__(*args, **kwargs)
        let_go(self.block)
        return out


@contextmanager
def each_block_read(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Within it an mlx-lm model can be called, once, with one block in memory at a time."""
    castable = may_cast(model)
    with replaced(places_of(model), [_Read(b, precision, castable) for b in model.layers]):
        yield


def cast_around_blocks(decoder: Decoder, dtype: mx.Dtype) -> Decoder:
    """The decoder, whose embedding, final norm and head now compute in a dtype. What looks tokens
    up stays packed; its scales decide what a looked-up row is rounded to."""

    castable = may_cast(decoder.model) if dtype != mx.float32 else None

    def cast(name: str, value: mx.array) -> mx.array:
        wanted = mx.issubdtype(value.dtype, mx.floating) and (not castable or castable(name))
        return value.astype(dtype) if wanted else value

    with decoder.without_blocks():
        decoder.model.update(tree_map_with_path(cast, decoder.model.parameters()))
    return decoder


def let_go(module: nn.Module) -> None:
    """Give the memory of a module's weights back."""
    module.update(tree_map(lambda _: mx.zeros((0,)), module.parameters()))
    mx.clear_cache()
