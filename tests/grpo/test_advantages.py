"""Rows that teach are those whose scores vary most; equal rewards teach nothing."""

from itertools import combinations
from statistics import pvariance

import mlx.core as mx
import pytest

from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.grpo.advantages import group_advantages, is_dead, rows_that_teach, training_group

SCORES = [0.3, -1.0, 2.0, 0.1, 0.1, -0.9]


def group(count: int) -> Group:
    completions = [
        Completion(tuple(range(1, 2 + i)), "x", "stop", (-0.5,) * (1 + i)) for i in range(count)
    ]
    return Group(Prompt("p", (), (7, 8)), tuple(completions))


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_no_other_rows_have_more_variance(m: int) -> None:
    rows = rows_that_teach(SCORES, m)
    assert rows == sorted(set(rows)) and len(rows) == m
    most = max(pvariance(c) for c in combinations(SCORES, m))
    assert pvariance([SCORES[i] for i in rows]) == pytest.approx(most)


@pytest.mark.parametrize("m", [0, 6, 7])
def test_all_rows_are_taken_where_no_fewer_are_asked_for(m: int) -> None:
    assert rows_that_teach(SCORES, m) == [0, 1, 2, 3, 4, 5]


def test_equal_scores_are_dead_whichever_rows_are_taken() -> None:
    rows = rows_that_teach([1.0] * 6, 3)
    assert len(rows) == 3
    assert is_dead(training_group(0, group(6), rows, [1.0] * 3))


def test_a_training_group_holds_the_chosen_rows_and_their_own_mean() -> None:
    made = training_group(5, group(6), [1, 4], [1.0, 3.0])
    assert (made.position, made.prompt_ids) == (5, (7, 8))
    assert made.mask_KT.sum(axis=-1).tolist() == [2, 5]
    assert made.advantages_K.tolist() == [-1.0, 1.0]
    assert made.sampled_logp_KT[0].tolist() == pytest.approx([-0.5, -0.5, 0, 0, 0])


def test_advantages_divide_by_the_deviation_only_when_asked() -> None:
    rewards_PK = mx.array([[1.0, 2.0, 3.0]])
    assert group_advantages(rewards_PK).tolist() == [[-1.0, 0.0, 1.0]]
    assert group_advantages(rewards_PK, "std").tolist()[0] == pytest.approx([-1, 0, 1], abs=1e-3)


def test_advantages_divide_by_the_deviation_of_the_batch_when_asked() -> None:
    rewards_PK = mx.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    found = group_advantages(rewards_PK, "batch", batch_std=4.0)
    assert found.tolist()[0] == pytest.approx([-0.25, 0, 0.25], abs=1e-4)
    assert found.tolist()[1] == [0, 0, 0]


def test_group_is_the_name_of_what_std_was() -> None:
    rewards_PK = mx.array([SCORES])
    assert mx.array_equal(
        group_advantages(rewards_PK, "group"), group_advantages(rewards_PK, "std")
    )
