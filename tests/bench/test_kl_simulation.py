"""The controller on a policy whose KL is known: it settles, does not swing, and recovers."""

import numpy as np
import pytest

from bench.learning.kl_simulation import TARGETS, Toy, second_halves, simulate

ITERATIONS, RATE = 90, 0.004
PHASE = ITERATIONS // len(TARGETS)


def quiet(seed: int) -> Toy:
    """Batches so large that what moves is the controller, not the measurement."""
    return Toy(seed, prompts=32, dimensions=16, spread=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_decay_settles_within_a_fifth_of_every_target(seed: int) -> None:
    assert second_halves(simulate(Toy(seed), "decay", ITERATIONS, RATE)) == pytest.approx(
        [1, 1, 1], rel=0.2
    )


def test_decay_holds_a_policy_that_learns_fast() -> None:
    halves = [second_halves(simulate(Toy(seed), "decay", 45, 0.03)) for seed in range(8)]
    assert np.mean(halves, axis=0) == pytest.approx([1, 1, 1], rel=0.2)


def test_without_control_the_kl_leaves_every_target() -> None:
    assert min(second_halves(simulate(Toy(0), "none", ITERATIONS, RATE))) > 1.3


def test_decay_does_not_swing_around_a_target() -> None:
    history = simulate(quiet(0), "decay", ITERATIONS, RATE)
    for phase, target in enumerate(TARGETS):
        settled = np.array(history[phase * PHASE + PHASE // 2 : (phase + 1) * PHASE]) / target
        assert settled.min() > 0.75 and settled.max() < 1.25


@pytest.mark.parametrize("phase", range(3))
def test_decay_recovers_from_a_tenfold_kl(phase: int) -> None:
    hit = phase * PHASE + PHASE // 2
    history = simulate(quiet(1), "decay", ITERATIONS, RATE, lambda i: 10.0 if i == hit else 1.0)
    target = TARGETS[phase]
    assert history[hit] > 7 * target
    assert all(abs(kl / target - 1) < 0.25 for kl in history[hit + 8 : (phase + 1) * PHASE])


def test_a_penalty_in_the_reward_holds_long_runs_only() -> None:
    short, long = (
        second_halves(simulate(Toy(0), "reward", iterations, 0.002)) for iterations in (60, 800)
    )
    assert max(abs(x - 1) for x in long) < 0.5 < max(abs(x - 1) for x in short)
