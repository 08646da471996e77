"""Rows of similar length, and texts of different prompts, that are run together: every one once,
and less work than in one piece or one by one."""

import itertools

import mlx.core as mx
import pytest

from mlx_grpo.core.padding import (
    joined,
    length_buckets,
    pad_right,
    row_lengths,
    rows_of,
    shared_passes,
)
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import TokenIds, TrainingGroup


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


def texts_of(template: int, lengths: tuple[int, ...]) -> list[TokenIds]:
    """Texts that begin with so many tokens in common and go on apart, in no order of length."""
    opening = tuple(range(100, 100 + template))
    return [(*opening, *(1 + i + (t * t) % 7 for t in range(n))) for i, n in enumerate(lengths)]


LENGTHS = (5, 40, 12, 33, 8, 40, 21, 2, 16)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 90])
@pytest.mark.parametrize("template", [1, 20])
def test_passes_hold_every_text_once_within_their_bounds(
    rows: int, tokens: int, template: int
) -> None:
    texts = texts_of(template, LENGTHS)
    limits = [template + n // 2 for n in LENGTHS]
    found = list(shared_passes(texts, limits, rows, tokens))
    assert sorted(i for p in found for i in p.places) == list(range(len(texts)))
    for p in found:
        assert [(*p.prefix, *row) for row in p.rows] == [texts[i] for i in p.places]
        assert 0 < len(p.prefix) <= min(limits[i] for i in p.places) and all(p.rows)
        assert len(p.rows) <= (rows or len(texts))
        computed = len(p.prefix) + len(p.rows) * max(map(len, p.rows))
        assert len(p.rows) == 1 or computed <= (tokens or computed)


def test_what_a_template_says_first_is_run_once_a_pass() -> None:
    texts = texts_of(20, LENGTHS)
    (one,) = shared_passes(texts, [len(t) - 1 for t in texts])
    assert len(one.prefix) == 20
    (whole,) = shared_passes([texts[1], texts[1]], [30, 25])
    assert len(whole.prefix) == 25  # what the same prompt says, up to the earlier answer


def test_lengths_of_a_pass_are_alike() -> None:
    texts = texts_of(1, tuple(permutation(1, "lengths", n=30)[i] + 2 for i in range(30)))
    found = list(shared_passes(texts, [1] * 30, rows=6))
    assert [max(map(len, p.rows)) - min(map(len, p.rows)) for p in found] == [5] * 5


def test_texts_that_begin_with_different_tokens_share_no_pass() -> None:
    found = list(shared_passes([(7, 1, 2), (8, 1, 2), (7, 3)], [1, 1, 1]))
    assert [(p.places, p.prefix) for p in found] == [([0, 2], (7,)), ([1], (8,))]
