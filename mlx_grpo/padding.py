"""Ragged token rows to arrays, padded on the right: a causal model never looks at what is there."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_grpo.types import Group

PAD = 0  # any token will do; masks go by length


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[mx.array, list[int]]:
    """(int [K, T], lengths) of K token rows."""
    longest = max(map(len, rows))
    return mx.array([[*r, *([PAD] * (longest - len(r)))] for r in rows]), [len(r) for r in rows]


def completion_arrays(group: Group) -> tuple[mx.array, mx.array]:
    """(tokens int [K, T], mask fp32 [K, T]) of a group's completions."""
    tokens_KT, lengths = pad_right([c.token_ids for c in group.completions])
    mask_KT = mx.arange(tokens_KT.shape[1])[None] < mx.array(lengths)[:, None]
    return tokens_KT, mask_KT.astype(mx.float32)
