"""Ragged token rows to arrays, padded on the right: a causal model never looks at what is there.

Rows of similar length are run together, so that little is computed on padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import mlx.core as mx
import numpy as np

from mlx_grpo.core.types import Completion, TokenIds, TrainingGroup

PAD = 0  # any token will do; masks go by length


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[mx.array, list[int]]:
    """(int [K, T], lengths) of K token rows."""
    longest = max(map(len, rows))
    return mx.array([[*r, *([PAD] * (longest - len(r)))] for r in rows]), [len(r) for r in rows]


def completion_arrays(completions: Sequence[Completion]) -> tuple[mx.array, mx.array]:
    """(tokens int [K, T], mask fp32 [K, T]) of completions; the mask is 1 on the model's tokens."""
    tokens_KT, lengths = pad_right([c.token_ids for c in completions])
    mask_KT = mx.arange(tokens_KT.shape[1])[None] < mx.array(lengths)[:, None]
    if any(c.by_model for c in completions):
        said_KT, _ = pad_right([c.by_model or (True,) * len(c.token_ids) for c in completions])
        mask_KT = mask_KT & (said_KT != 0)
    return tokens_KT, mask_KT.astype(mx.float32)


def sampled_logps(completions: Sequence[Completion]) -> mx.array:
    """Log-probs [K, T] of completions as the sampler saw them, zero on padding."""
    longest = max(len(c.logps) for c in completions)
    return mx.array([[*c.logps, *([0.0] * (longest - len(c.logps)))] for c in completions])


def row_lengths(mask_KT: mx.array) -> list[int]:
    """Tokens of each row, up to the last that counts: observations lie between those of the mask,
    and never at the end."""
    mask = np.asarray(mask_KT) > 0
    last = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    return [int(n) for n in np.where(mask.any(axis=1), last, 0)]


def length_buckets(lengths: Sequence[int], prompt: int, most: int = 0) -> list[list[int]]:
    """Rows cut into buckets of similar length, such that the fewest positions are computed.

    A bucket costs its longest row times its rows, and the prompt once more.

    Args:
        lengths: tokens of each row.
        prompt: tokens of the prompt they share.
        most: rows a bucket may have; 0 means any number.

    Returns:
        Indices of rows, ascending within a bucket; equal lengths stay in one.
    """
    count, order = len(lengths), sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cheapest, cuts = [0], [0]  # of the first i rows in that order: cost, and where the last begins
    for end in range(1, count + 1):
        first = max(0, end - most) if most else 0
        costs = [
            cheapest[start] + prompt + (end - start) * lengths[order[start]]
            for start in range(first, end)
        ]
        cheapest.append(min(costs))
        cuts.append(first + costs.index(min(costs)))
    buckets, end = [], count
    while end:
        buckets.append(sorted(order[cuts[end] : end]))
        end = cuts[end]
    return buckets[::-1]


@dataclass(frozen=True)
class SharedPass:
    """Texts that are run together: the beginning they share, and what follows it in each."""

    places: list[int]
    """Which of the texts."""
    prefix: TokenIds
    rows: list[TokenIds]


def shared_passes(
    texts: Sequence[TokenIds], limits: Sequence[int], rows: int = 0, tokens: int = 0
) -> Iterator[SharedPass]:
    """Texts of different prompts, several to a pass.

    A chat template begins all of its prompts alike, so such texts too have a prefix to run once.
    Those of a pass begin with the same token and have similar lengths.

    Args:
        texts: token ids, at least two per text.
        limits: the longest prefix that each text allows, shorter than the text.
        rows: most texts in a pass; 0 means any number.
        tokens: most tokens in a pass, padding included; a longer text has a pass of its own. 0
            means any number.
    """
    alike: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        alike.setdefault(text[0], []).append(place)
    for places in alike.values():
        shared = _shared(texts, limits, places)
        left = sorted(places, key=lambda i: -len(texts[i]))
        while left:
            count = rows or len(left)
            if tokens:
                longest = len(texts[left[0]])
                count = min(count, max(1, (tokens - shared) // (longest - shared)))
            chosen, left = left[:count], left[count:]
            prefix = _shared(texts, limits, chosen)
            yield SharedPass(chosen, texts[chosen[0]][:prefix], [texts[i][prefix:] for i in chosen])


def _shared(texts: Sequence[TokenIds], limits: Sequence[int], places: Sequence[int]) -> int:
    """Length of the longest prefix that these texts share and may share."""
    chosen = [texts[i] for i in places]
    return min(common_prefix(chosen), *(limits[i] for i in places))


def common_prefix(rows: Sequence[TokenIds]) -> int:
    """Length of the longest prefix all rows share, leaving at least one token to each."""
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if len({r[i] for r in rows}) > 1), limit)


def rows_of(group: TrainingGroup, rows: Sequence[int]) -> TrainingGroup:
    """Some rows of a group, or none, cut to the longest of them; fields' names say what their axes
    are."""
    index = mx.array(rows, dtype=mx.int32)
    longest = max(row_lengths(group.mask_KT[index]), default=0)
    cut = {}
    for name in (f.name for f in fields(group)):
        if name.endswith("_KT"):
            cut[name] = getattr(group, name)[index, :longest]
        elif name.endswith("_K"):
            cut[name] = getattr(group, name)[index]
    return replace(group, **cut)


def joined(parts: Sequence[tuple[list[int], mx.array]], shape: tuple[int, ...]) -> mx.array:
    """[K, T] of the given shape from (rows, values [rows, T or fewer]), zero elsewhere."""
    whole_KT = mx.zeros(shape)
    for rows, values in parts:
        whole_KT[mx.array(rows), : values.shape[1]] = values
    return whole_KT
