"""How well each actuator of the KL controller holds its targets, on a policy whose KL is known.

    python bench/learning/kl_simulation.py [--seeds 20] [--kl-share 1] [--prompts 4]

The policy draws each of T tokens from a Gaussian around theta, the reference around zero: its KL is
|theta|^2 / 2 nats per token. GRPO trains theta (groups of K, advantages without scaling, AdamW) on
a linear reward with noise. Prompts differ in how far they move the policy, so a batch's KL is as
noisy as a real one. `kl_controller.py` sees what it sees in a run: the mean of k3, over the batch
or over a share of its completions (`--kl-share`). The table shows the KL of all of them.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mlx_grpo.config.settings import KLSettings, train_config
from mlx_grpo.console.output import Console
from mlx_grpo.grpo.kl_controller import Actuator, KLController, kl_target
from mlx_grpo.grpo.learner import first_state
from mlx_grpo.grpo.reference import measured_rows

TARGETS = (0.05, 0.02, 0.01)
BETAS = 0.9, 0.999  # AdamW's


@dataclass
class Toy:
    """A Gaussian policy under GRPO."""

    seed: int
    prompts: int = 4
    K: int = 6
    tokens: int = 40
    dimensions: int = 32
    spread: float = 0.3
    """Standard deviation of the logarithm of how far a prompt moves the policy."""
    steps: int = 2
    """Optimizer steps per iteration."""
    share: float = 1.0
    """Of the completions, those whose KL the controller sees."""
    theta: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.wanted = self.random.normal(size=self.dimensions)
        self.wanted /= np.linalg.norm(self.wanted)
        self.theta = np.zeros(self.dimensions)
        self.moments = np.zeros((2, self.dimensions))
        self.updates = 0

    def iterate(self, controller: KLController, target: float) -> tuple[float, KLController]:
        """Roll out, step the controller, update; the batch's k3 and the next controller."""
        shape = (self.prompts, self.K, self.tokens, self.dimensions)
        reach = np.exp(self.spread * self.random.normal(size=(self.prompts, 1, 1, 1)))
        mean = reach * self.theta
        drawn = mean + self.random.normal(size=shape)
        log_ratio = (mean * drawn).sum(-1) - (mean**2).sum(-1) / 2
        k3 = (np.exp(-log_ratio) - 1 + log_ratio).mean(-1)
        measured = KLSettings(share=self.share).measured(self.prompts * self.K)
        rows = measured_rows(self.seed, self.updates, self.prompts, self.K, measured)
        seen = float(np.mean([k3[p, i] for p, chosen in enumerate(rows) for i in chosen]))
        signal = drawn.mean(2) @ self.wanted * math.sqrt(self.tokens)
        z = (signal + self.random.normal(size=signal.shape)) / math.sqrt(2)
        shaped = z - controller.penalty * log_ratio.mean(-1)
        advantage = shaped - shaped.mean(1, keepdims=True)
        gradient = -advantage[..., None] * (reach * (drawn - mean)).mean(2)
        for part in np.array_split(gradient, self.steps):
            self._adam(part.mean((0, 1)), controller.learning_rate)
        after = controller.step(seen, target)
        self.theta *= math.exp(-after.decay)
        return float(k3.mean()), after

    def _adam(self, gradient: np.ndarray, rate: float) -> None:
        self.updates += 1
        for moment, beta, value in zip(self.moments, BETAS, (gradient, gradient**2), strict=True):
            moment *= beta
            moment += (1 - beta) * value
        first, second = (
            moment / (1 - beta**self.updates)
            for moment, beta in zip(self.moments, BETAS, strict=True)
        )
        self.theta -= rate * first / (np.sqrt(second) + 1e-8)


def simulate(
    toy: Toy,
    actuator: Actuator,
    iterations: int,
    learning_rate: float,
    disturb: Callable[[int], float] = lambda iteration: 1.0,
) -> list[float]:
    """The KL of each iteration under the phased targets.

    Args:
        disturb: the factor that the policy's KL is multiplied by before an iteration.
    """
    config = train_config(
        kl_control=actuator,
        learning_rate=learning_rate,
        kl_lr_min=learning_rate / 100,
        kl_lr_max=learning_rate * 10,
    )
    controller, history = first_state(config).controller, []
    for i in range(iterations):
        toy.theta *= math.sqrt(disturb(i))
        kl, controller = toy.iterate(controller, kl_target(i, iterations, "phased", TARGETS))
        history.append(kl)
    return history


def second_halves(history: list[float]) -> list[float]:
    """Mean KL of the second half of each phase, in units of its target."""
    n = len(history) // len(TARGETS)
    return [
        float(np.mean(history[phase * n + n // 2 : (phase + 1) * n])) / target
        for phase, target in enumerate(TARGETS)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kl-share", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=4)
    args = parser.parse_args()
    seeds, toy = args.seeds, {"prompts": args.prompts, "share": args.kl_share}
    rows = []
    for iterations, rate in ((30, 0.01), (45, 0.03), (90, 0.004), (300, 0.002), (800, 0.002)):
        for actuator in ("decay", "reward", "lr", "none"):
            halves = np.array(
                [
                    second_halves(simulate(Toy(seed, **toy), actuator, iterations, rate))
                    for seed in range(seeds)
                ]
            )
            near = (abs(halves - 1) < 0.3).all(1).mean()
            cells = zip(halves.mean(0), halves.std(0), strict=True)
            figures = (f"{mean:.2f} ({deviation:.2f})" for mean, deviation in cells)
            rows.append((f"{iterations} at {rate:g}", actuator, *figures, f"{near:.0%}"))
    Console().table(
        f"Mean KL / target in the second half of each phase; mean (deviation) of {seeds} seeds",
        ("iterations", "control", *(f"{t:g}" for t in TARGETS), "all in 30 %"),
        rows,
    )


if __name__ == "__main__":
    main()
