"""Buckets of rows of similar length: every row once, and less work than in one piece."""

import itertools

import mlx.core as mx
import pytest

from mlx_grpo.core.padding import joined, length_buckets, pad_right, row_lengths, rows_of
from mlx_grpo.core.types import TrainingGroup


def cost(buckets: list[list[int]], lengths: tuple[int, ...], prompt: int) -> int:
    return sum(prompt + len(b) * max(lengths[i] for i in b) for b in buckets)


@pytest.mark.parametrize(
    "lengths", [(5,), (9, 4, 1), (64, 64, 60, 12, 11, 3), (3, 64, 3, 64, 3, 64)]
)
@pytest.mark.parametrize("prompt", [1, 20, 500])
def test_buckets_hold_every_row_once_at_the_lowest_cost(
    lengths: tuple[int, ...], prompt: int
) -> None:
    buckets = length_buckets(lengths, prompt)
    assert sorted(itertools.chain(*buckets)) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cheapest = min(
        cost([order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))], lengths, prompt)
        for n in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), n)
    )
    assert cost(buckets, lengths, prompt) == cheapest


def test_equal_lengths_stay_in_one_bucket_in_their_order() -> None:
    assert length_buckets([7] * 6, 1) == [[0, 1, 2, 3, 4, 5]]


def test_a_bucket_has_at_most_the_rows_it_may_have() -> None:
    buckets = length_buckets([5, 5, 5, 5, 5], 100, most=2)
    assert sorted(map(len, buckets)) == [1, 2, 2]


def test_rows_are_cut_to_their_longest_and_put_back() -> None:
    tokens_KT, lengths = pad_right([[1, 2, 3], [4], [5, 6]])
    mask_KT = (mx.arange(3)[None] < mx.array(lengths)[:, None]).astype(mx.float32)
    logp_KT = -tokens_KT.astype(mx.float32) * mask_KT
    group = TrainingGroup(0, (9,), tokens_KT, mask_KT, logp_KT, mx.array([1.0, 2.0, 3.0]))
    parts = [(rows, rows_of(group, rows)) for rows in ([0], [1, 2])]
    assert parts[1][1].tokens_KT.tolist() == [[4, 0], [5, 6]]
    assert parts[1][1].advantages_K.tolist() == [2.0, 3.0]
    assert row_lengths(parts[1][1].mask_KT) == [1, 2]
    put_back = joined([(rows, part.sampled_logp_KT) for rows, part in parts], (3, 3))
    assert put_back.tolist() == logp_KT.tolist()
