"""Targets fall in phases, and the controller moves towards them within its bounds."""

from dataclasses import replace

import pytest

from mlx_grpo.grpo.kl_controller import Actuator, KLController, kl_target

TARGETS = (0.05, 0.02, 0.01)


def controller(actuator: Actuator = "reward") -> KLController:
    return KLController(
        actuator,
        beta=10.0,
        learning_rate=1e-4,
        gain=1.0,
        beta_min=0.1,
        beta_max=1000.0,
        learning_rate_min=1e-6,
        learning_rate_max=1e-3,
    )


@pytest.mark.parametrize("iterations", [3, 9, 300, 801])
def test_phased_targets_change_at_the_thirds(iterations: int) -> None:
    third = iterations // 3
    targets = [kl_target(i, iterations, "phased", TARGETS) for i in range(iterations)]
    assert targets == [0.05] * third + [0.02] * third + [0.01] * third


def test_phased_targets_never_rise_where_thirds_do_not_come_out_even() -> None:
    targets = [kl_target(i, 10, "phased", TARGETS) for i in range(10)]
    assert targets == [0.05] * 4 + [0.02] * 3 + [0.01] * 3


def test_phases_may_differ_in_length() -> None:
    targets = [kl_target(i, 8, "phased", (0.3, 0.2), (1, 3)) for i in range(8)]
    assert targets == [0.3] * 2 + [0.2] * 6


def test_rounding_does_not_delay_a_phase() -> None:
    targets = tuple(1.0 / n for n in range(1, 11))  # 0.1 + 0.1 + 0.1 is above 3 / 10
    assert tuple(kl_target(i, 10, "phased", targets) for i in range(10)) == targets


def test_after_the_last_iteration_the_last_target_holds() -> None:
    assert kl_target(8, 8, "phased", TARGETS) == 0.01
    assert kl_target(99, 8, "phased", TARGETS, (2, 1, 1)) == 0.01
    assert kl_target(99, 8, "linear", TARGETS) == pytest.approx(0.01)


def test_a_constant_schedule_keeps_the_first_target() -> None:
    assert {kl_target(i, 6, "constant", TARGETS) for i in range(6)} == {0.05}


def test_a_linear_schedule_runs_from_the_first_target_to_the_last() -> None:
    targets = [kl_target(i, 4, "linear", TARGETS) for i in range(5)]
    assert targets == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (0.02, 10.0),  # on target
        (0.022, 11.0),  # 10 % above
        (0.018, 9.0),
        (0.024, 12.0),  # just at the clip of the error
        (2.0, 12.0),  # far above: clipped to 20 %
        (0.0, 8.0),
    ],
)
def test_beta_follows_the_clipped_relative_error(kl: float, beta: float) -> None:
    assert controller().step(kl, target=0.02).beta == pytest.approx(beta)


def test_the_gain_scales_the_step_of_beta() -> None:
    assert replace(controller(), gain=0.5).step(1.0, 0.02).beta == pytest.approx(11.0)


@pytest.mark.parametrize(("kl", "bound"), [(1.0, 1000.0), (0.0, 0.1)])
def test_beta_stays_within_its_bounds(kl: float, bound: float) -> None:
    state = controller()
    for _ in range(60):
        state = state.step(kl, 0.02)
    assert state.beta == bound
    assert state.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.041, 1 / 1.5), (0.04, 1.0), (0.02, 1.0), (0.01, 1.0), (0.009, 1.5)],
)
def test_the_learning_rate_moves_outside_a_factor_of_two(kl: float, factor: float) -> None:
    after = controller("lr").step(kl, target=0.02)
    assert after.learning_rate == pytest.approx(1e-4 * factor)
    assert after.beta == 10.0


@pytest.mark.parametrize(("kl", "bound"), [(1.0, 1e-6), (0.0, 1e-3)])
def test_the_learning_rate_stays_within_its_bounds(kl: float, bound: float) -> None:
    state = controller("lr")
    for _ in range(20):
        state = state.step(kl, 0.02)
    assert state.learning_rate == bound


def decays(*ratios: float) -> list[float]:
    """The decay after each of these values of kl / target."""
    state, seen = controller("decay"), []
    for ratio in ratios:
        state = state.step(0.02 * ratio, 0.02)
        seen.append(state.decay)
    return seen


def test_decay_acts_at_once_and_learns_what_stays() -> None:
    assert decays(1.2, 1.2, 1.2) == pytest.approx([0.05, 0.08, 0.11])  # 0.25 e + 0.15 sum(e)


def test_a_jump_is_not_remembered() -> None:
    assert decays(10.0, 1.0) == [1.0, 0.0]


def test_decay_is_at_most_one_and_never_grows_the_adapter() -> None:
    assert decays(99.0, 0.1, 0.1) == [1.0, 0.0, 0.0]
    assert decays(0.0) == [0.0]


def test_a_new_target_is_no_error_of_the_old_decay() -> None:
    steady = replace(controller("decay"), decay_sum=0.1, aimed=0.04)
    after = steady.step(0.04, 0.01)  # on the target it was steered to, which is now a fourth
    assert after.decay_sum == pytest.approx(0.1 * 2)
    assert after.decay == pytest.approx(0.1 * 2 + 0.25 * 3)


def test_the_gain_scales_the_decay() -> None:
    assert replace(controller("decay"), gain=0.5).step(0.024, 0.02).decay == pytest.approx(0.025)


def test_without_an_actuator_nothing_moves() -> None:
    assert controller("none").step(5.0, 0.02) == controller("none")


def test_only_the_reward_actuator_penalises_the_reward() -> None:
    penalties = {a: controller(a).penalty for a in ("decay", "reward", "lr", "none")}
    assert penalties == {"decay": 0.0, "reward": 10.0, "lr": 0.0, "none": 0.0}


@pytest.mark.parametrize("actuator", ["decay", "reward", "lr", "none"])
@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_moves_nothing(actuator: Actuator, kl: float) -> None:
    assert controller(actuator).step(kl, 0.05) == controller(actuator)


@pytest.mark.parametrize("actuator", ["reward", "lr", "none"])
def test_a_run_that_goes_on_with_another_actuator_decays_no_more(actuator: Actuator) -> None:
    left = replace(controller(actuator), decay=0.1, decay_sum=0.1, aimed=0.1).step(0.05, 0.05)
    assert (left.decay, left.decay_sum, left.aimed) == (0.0, 0.0, 0.0)
