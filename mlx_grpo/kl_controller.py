"""Hold the KL to the reference on a target that falls in phases: pure, no arrays.

Actuators:
- `reward`: the shaped reward is z_i - beta * kl_i, and beta follows the measured KL (Ziegler et al.
  2019, arXiv:1909.08593, section 2.2):
      e = clip(kl / target - 1, -0.2, 0.2)
      beta <- clip(beta * (1 + gain * e), beta_min, beta_max)
- `lr`: the learning rate is divided by 1.5 above twice the target and multiplied by 1.5 below half
  of it.
- `none`: nothing is moved.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

ERROR_CLIP = 0.2
LR_FACTOR = 1.5

Schedule = Literal["phased", "constant", "linear"]
Actuator = Literal["reward", "lr", "none"]


def kl_target(
    iteration: int,
    num_iterations: int,
    schedule: Schedule,
    targets: tuple[float, ...],
    phases: tuple[float, ...] = (),
) -> float:
    """Target in nats per token for `iteration`, counted from 0.

    Args:
        schedule: `phased`: one target per phase; `constant`: the first target; `linear`: from the
            first to the last.
        phases: relative lengths of the phases; empty means equal ones.
    """
    if schedule == "constant":
        return targets[0]
    progress = iteration / max(num_iterations, 1)
    if schedule == "linear":
        return targets[0] + (targets[-1] - targets[0]) * min(progress, 1.0)
    lengths = phases or (1.0,) * len(targets)
    end = 0.0
    for target, length in zip(targets, lengths, strict=True):
        end += length / sum(lengths)
        if progress < end - 1e-9:
            return target
    return targets[-1]


@dataclass(frozen=True)
class KLController:
    """State and constants of the controller; `step` returns the next state."""

    actuator: Actuator
    beta: float
    learning_rate: float
    gain: float
    beta_min: float
    beta_max: float
    learning_rate_min: float
    learning_rate_max: float

    def step(self, kl: float, target: float) -> "KLController":
        """The controller after an iteration whose mean KL (k3, nats per token) was `kl`."""
        if not math.isfinite(kl):
            return self
        if self.actuator == "reward":
            error = min(max(kl / target - 1, -ERROR_CLIP), ERROR_CLIP)
            beta = min(max(self.beta * (1 + self.gain * error), self.beta_min), self.beta_max)
            return replace(self, beta=beta)
        if self.actuator == "lr":
            factor = 1 / LR_FACTOR if kl > 2 * target else LR_FACTOR if kl < target / 2 else 1.0
            rate = min(
                max(self.learning_rate * factor, self.learning_rate_min), self.learning_rate_max
            )
            return replace(self, learning_rate=rate)
        return self

    @property
    def penalty(self) -> float:
        """Weight of the per-completion KL in the shaped reward."""
        return self.beta if self.actuator == "reward" else 0.0
