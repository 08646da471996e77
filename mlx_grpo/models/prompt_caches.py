"""What a prompt leaves to the completions behind it, with gradients flowing back into it.

A decoder's blocks are given these in place of mlx-lm's own caches, which write into buffers and
have no gradient. Keys and values are remembered and joined; recurrent states and windows of
convolutions (`ArraysCache`) start empty for the prompt and from its last state for the completions.
Completions are padded on the right, which no earlier token can see.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    create_attention_mask,
    make_prompt_cache,
)

from mlx_grpo.core.errors import InputError
from mlx_grpo.models.families import gemma2
from mlx_grpo.models.stand_ins import CacheWire, family


class _Prefix:
    """Common part of the two caches below: positions and masks as mlx-lm's own caches give them.

    Args:
        max_size: how many tokens the cache of mlx-lm keeps; None means all.
    """

    keys: Any = None
    values: Any = None

    def __init__(self, max_size: int | None = None, offset: int = 0):
        self.max_size, self.offset = max_size, offset

    def keys_and_values(self) -> tuple[Any, Any]:
        """What a block has left here, of the prompt first; stand-ins for it where none has run."""
        if self.keys is None:
            return CacheWire(self, 0), CacheWire(self, 1)
        return self.keys, self.values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if self.max_size is not None and (window_size or 0) > self.max_size:
            raise InputError(
                f"its mask lets a token see {window_size} tokens, its caches keep {self.max_size}"
            )
        return create_attention_mask(n, self.offset, return_array, window_size or self.max_size)


class PromptCache(_Prefix):
    """Remembers the prompt's keys and values, [1, heads, T_prompt, d], and passes them through."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class CompletionCache(_Prefix):
    """Puts the prompt's keys and values, broadcast over rows, before the completions' own."""

    def __init__(self, max_size: int | None, prompt_length: int, prompt: PromptCache | None):
        super().__init__(max_size, prompt_length)
        self.prompt = prompt

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.prompt is None:
            raise RuntimeError("a placeholder cache cannot be run")

        def join(prefix: mx.array, own: mx.array) -> mx.array:
            return mx.concatenate(
                [mx.broadcast_to(prefix, (own.shape[0], *prefix.shape[1:])), own], axis=2
            )

        self.keys, self.values = join(self.prompt.keys, keys), join(self.prompt.values, values)
        return self.keys, self.values


class StateCache(ArraysCache):
    """Recurrent states and windows of convolutions of unpadded rows."""

    def make_mask(self, n: int) -> None:
        return None


def prompt_cache(kind: Any) -> Any:
    """What stands in for a cache of mlx-lm while the prompt runs.

    Raises:
        InputError: a kind of cache that nothing here stands in for.
    """
    if isinstance(kind, ArraysCache):
        return StateCache(len(kind.cache))
    if isinstance(kind, CacheList):
        return tuple(map(prompt_cache, kind.caches))
    if isinstance(kind, KVCache | RotatingKVCache):
        return PromptCache(getattr(kind, "max_size", None))
    raise InputError(f"its blocks keep a {type(kind).__name__}, which cannot be taken apart")


def completion_cache(kind: Any, prompt_length: int, rows: int, prompt: Any = None) -> Any:
    """What stands in for it while the completions run; without `prompt` it only makes masks."""
    if isinstance(kind, ArraysCache):
        cache = StateCache(len(kind.cache))
        if prompt is not None:
            cache.cache = [
                None if v is None else mx.broadcast_to(v, (rows, *v.shape[1:]))
                for v in prompt.cache
            ]
        return cache
    if isinstance(kind, CacheList):
        prompts = prompt or (None,) * len(kind.caches)
        return tuple(
            completion_cache(k, prompt_length, rows, p)
            for k, p in zip(kind.caches, prompts, strict=True)
        )
    return CompletionCache(getattr(kind, "max_size", None), prompt_length, prompt)


def holds_state(cache: Any) -> bool:
    """Whether something has been left in a `StateCache`."""
    return isinstance(cache, StateCache) and not cache.empty()


def contents(cache: Any) -> tuple[mx.array, mx.array]:
    """Keys and values that later blocks read."""
    return cache.keys, cache.values


def filled(cache: Any, kept: tuple[mx.array, mx.array]) -> Any:
    """The cache with what an earlier block has left in it."""
    cache.keys, cache.values = kept
    return cache


def caches_of_whole_sequences(model: nn.Module) -> list[Any] | None:
    """What a model needs beside whole sequences to compute what it is meant to: most need none."""
    return make_prompt_cache(model) if family(model) == "gemma3n" else None


def rollout_caches(
    model: nn.Module, per_prompt: Sequence[Sequence[Any]], rows: Sequence[int]
) -> list[Any]:
    """mlx-lm's own caches for a batch.

    Args:
        per_prompt: the caches that hold each prompt.
        rows: the number of the prompt of each row.
    """
    batch = []
    for layer in zip(*per_prompt, strict=True):
        cache = type(layer[0]).merge(list(layer))
        cache.filter(mx.array(rows))
        if family(model) == "gemma2":
            gemma2.add_group_axis_to_masks(cache)
        batch.append(cache)
    return batch
