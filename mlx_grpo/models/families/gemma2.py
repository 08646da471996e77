"""Gemma 2 in mlx-lm: attention scores have an axis more than the mask of a batch.

Its scores are [B, key heads, queries per key head, L, S], and the mask of a batch, [B, 1, L, S], is
broadcast from the right: its rows would meet the key heads. With as many rows as key heads that
goes unnoticed.
"""

from typing import Any

import mlx.core as mx


def add_group_axis_to_masks(cache: Any) -> None:
    """Let a cache for a batch make masks [B, 1, 1, L, S]."""
    make_mask = cache.make_mask

    def with_axis(*args: Any, **kwargs: Any) -> Any:
        mask = make_mask(*args, **kwargs)
        return mask[:, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask

    cache.make_mask = with_axis
