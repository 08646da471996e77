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
from mlx_grpo.models.stand_ins import StandIn


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


class _Read(StandIn):
    """Reads a block when it is called, and lets it go."""

    def __init__(self, block: nn.Module, bring: Callable[[nn.Module], None]):
        super().__init__(block)
        self.bring = bring

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.bring(self.block)
        out = super().__call__(*args, **kwargs)
        mx.eval(out)
        let_go(self.block)
        return out


@contextmanager
def each_block_read(decoder: Decoder, precision: Precision) -> Iterator[None]:
    """Within it the whole model can be called, once, with one block in memory at a time."""
    castable = may_cast(decoder.model)

    def bring(block: nn.Module) -> None:
        apply_precision(block, precision, castable)

    with decoder.standing_in([_Read(block, bring) for block in decoder.blocks]):
        yield


def cast_around_blocks(decoder: Decoder, dtype: mx.Dtype) -> None:
    """Let embedding, final norm and head compute in a dtype. What looks tokens up stays packed; its
    scales decide what a looked-up row is rounded to."""

    castable = may_cast(decoder.model) if dtype != mx.float32 else None

    def cast(name: str, value: mx.array) -> mx.array:
        wanted = mx.issubdtype(value.dtype, mx.floating) and (not castable or castable(name))
        return value.astype(dtype) if wanted else value

    with decoder.without_blocks():
        decoder.model.update(tree_map_with_path(cast, decoder.model.parameters()))


def let_go(module: nn.Module) -> None:
    """Give the memory of a module's weights back."""
    module.update(tree_map(lambda _: mx.zeros((0,)), module.parameters()))
    mx.clear_cache()
