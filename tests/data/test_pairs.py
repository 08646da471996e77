"""Pairs are gathered by prompt and divided by prompt."""

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import PreferencePair
from mlx_grpo.data.pairs import PairGroup, group_pairs, split_groups


def pair(prompt: int, chosen: int, rejected: int) -> PreferencePair:
    return PreferencePair("x", (prompt,), (chosen, 9), (rejected, 9))


def test_pairs_gather_by_prompt_and_share_their_answers() -> None:
    groups = group_pairs([pair(1, 10, 11), pair(2, 10, 12), pair(1, 12, 10), pair(1, 12, 11)])
    assert groups == [
        PairGroup((1,), ((10, 9), (11, 9), (12, 9)), ((0, 1), (2, 0), (2, 1))),
        PairGroup((2,), ((10, 9), (12, 9)), ((0, 1),)),
    ]


@pytest.mark.parametrize(
    ("count", "valid", "test", "sizes"),
    [
        (20, 0.1, 0.1, (16, 2, 2)),
        (20, 0.2, 0.5, (6, 4, 10)),
        (20, 0.0, 0.1, (18, 0, 2)),
        (5, 0.01, 0.01, (3, 1, 1)),
    ],
)
def test_a_split_keeps_all_pairs_of_a_prompt_on_one_side(
    count: int, valid: float, test: float, sizes: tuple[int, int, int]
) -> None:
    groups = group_pairs([pair(p, 10 + i, 20) for i in range(3) for p in range(count)])
    split = split_groups(groups, valid, test, seed=1)
    assert (len(split.train), len(split.valid), len(split.test)) == sizes
    everything = [*split.train, *split.valid, *split.test]
    assert all(len(g.pairs) == 3 for g in everything)
    assert sorted(g.prompt_ids for g in everything) == [(p,) for p in range(count)]


def test_a_split_depends_on_the_seed_alone() -> None:
    groups = group_pairs([pair(p, 10, 20) for p in range(20)])
    first = split_groups(groups, 0.1, 0.3, seed=1)
    assert first == split_groups(groups, 0.1, 0.3, seed=1)
    assert first.test != split_groups(groups, 0.1, 0.3, seed=2).test
    # what only the figures see does not depend on how the weights are chosen
    assert first.test == split_groups(groups, 0.0, 0.3, seed=1).test


def marked(*sides: str) -> list[PairGroup]:
    return [PairGroup((i,), ((1,), (2,)), ((0, 1),), side) for i, side in enumerate(sides)]


def test_a_file_that_names_three_sides_is_taken_at_its_word() -> None:
    split = split_groups(marked("train", "valid", "test", "train"), 0.1, 0.1, seed=1)
    assert {g.prompt_ids[0] for g in split.train} == {0, 3}
    assert [g.prompt_ids[0] for g in (*split.valid, *split.test)] == [1, 2]


def test_a_file_that_names_two_keeps_the_second_for_the_figures() -> None:
    groups = marked(*["train"] * 8, "valid", "valid")
    split = split_groups(groups, 0.2, 0.1, seed=1)
    assert [g.prompt_ids[0] for g in split.test] == [8, 9]
    assert (len(split.train), len(split.valid)) == (6, 2)
    assert split_groups(groups, 0.0, 0.1, seed=1).valid == []


@pytest.mark.parametrize(
    ("groups", "valid", "test"),
    [
        (marked(""), 0.0, 0.1),
        (marked("", ""), 0.1, 0.1),
        (marked("", ""), 0.0, 0.9),
        (marked("train", "train"), 0.0, 0.1),
        (marked("valid", "test"), 0.1, 0.1),
    ],
)
def test_a_split_that_leaves_a_side_empty_is_refused(
    groups: list[PairGroup], valid: float, test: float
) -> None:
    with pytest.raises(InputError, match="leave none to"):
        split_groups(groups, valid, test, seed=1)


def test_rows_that_are_marked_for_the_figures_are_never_trained_on() -> None:
    split = split_groups(marked("test", *[""] * 9), 0.2, 0.1, seed=1)
    assert [g.prompt_ids[0] for g in split.test] == [0]
    assert len(split.train) + len(split.valid) == 9
