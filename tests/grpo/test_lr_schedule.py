"""The learning rate rises, stays or falls, and is never zero."""

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.grpo.learner import first_state, learning_rate_at
from mlx_grpo.grpo.lr_schedule import Scheduler, rate_factor


def test_a_constant_rate_is_the_rate_itself_bit_for_bit() -> None:
    config = train_config(learning_rate=1.2345e-4)
    assert learning_rate_at(config, first_state(config)) == 1.2345e-4


def test_a_rate_falls_in_a_line_or_a_cosine_to_the_end() -> None:
    assert [rate_factor(i, 4, "linear") for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = [rate_factor(i, 4, "cosine") for i in range(4)]
    assert cosine == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_the_full_rate_and_costs_the_rest_its_length(
    scheduler: Scheduler,
) -> None:
    found = [rate_factor(i, 10, scheduler, 0.25) for i in range(10)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert min(found) > 0 and max(found) == 1.0
    assert found[3:] == [rate_factor(i, 7, scheduler) for i in range(7)]
