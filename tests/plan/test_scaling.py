"""Traffic between ranks, and up to where more of them pay."""

from dataclasses import replace

import pytest

from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.core.errors import InputError
from mlx_grpo.plan.devices import device
from mlx_grpo.plan.memory import RewardFootprint
from mlx_grpo.plan.planner import Planner
from mlx_grpo.plan.scaling import TOKEN_BYTES, Scaled, exchange, link_speed, pays_up_to
from tests.helpers.shapes import GEMMA_2B, WORK

GIGABIT = 1e9 / 8


def test_one_rank_exchanges_nothing() -> None:
    assert exchange(GEMMA_2B, WORK, 1, GIGABIT) == (0.0, 0.0)


def test_a_ring_of_two_sends_the_gradient_once_a_step_and_half_of_the_answers() -> None:
    traffic, seconds = exchange(GEMMA_2B, WORK, 2, GIGABIT)
    answers = WORK.prompts * WORK.k * WORK.completion_tokens * TOKEN_BYTES
    assert traffic == WORK.steps * GEMMA_2B.lora_bytes(WORK.lora_rank) + answers / 2
    assert seconds > traffic / GIGABIT


def test_more_ranks_never_send_twice_as_much() -> None:
    two, many = (exchange(GEMMA_2B, WORK, ranks, GIGABIT)[0] for ranks in (2, 64))
    assert two < many < 2 * two


@pytest.mark.parametrize(
    "seconds, ranks", [((10, 6, 4, 3), 4), ((10, 9.5, 9.2), 1), ((10, 6, 5.9, 4), 4)]
)
def test_ranks_pay_while_they_save_a_tenth(seconds: tuple[float, ...], ranks: int) -> None:
    assert pays_up_to([Scaled(n, 1, 0.0, s, 0.0) for n, s in enumerate(seconds, 1)]) == ranks


def test_a_link_is_in_bits_per_second() -> None:
    assert link_speed("10Gb/s") == 1.25e9
    assert link_speed("600 Mbps") == 75e6
    for text in ("10GB/s", "fast", "0Gb/s", ""):
        with pytest.raises(InputError, match="--link: must be bits per second"):
            link_speed(text)


@pytest.mark.parametrize(
    "step, ranks, prompts", [(3, 1, 6), (3, 2, 4), (6, 2, 3), (3, 3, 2), (4, 2, 3), (1, 2, 6)]
)
def test_ranks_wait_at_each_step_for_the_one_with_most(step: int, ranks: int, prompts: int) -> None:
    config = with_settings(TrainConfig(), batch_size=6, minibatch_size=step)
    planner = Planner(config, GEMMA_2B, RewardFootprint(), here=False, ranks=ranks)
    assert planner.work.learned.prompts == prompts
    alone, mac = replace(planner, ranks=1), device("m2-pro")
    shared, whole = (p.times(p.plan(), mac)["update"].flops for p in (planner, alone))
    assert shared / whole == pytest.approx(prompts / 6)
