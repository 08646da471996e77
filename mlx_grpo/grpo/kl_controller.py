"""Hold the KL to the reference on a target that falls in phases: pure, no arrays.

Actuators:
- `decay`: after the update the adapter is scaled by exp(-d), as decoupled weight decay towards the
  reference (Loshchilov & Hutter 2017, arXiv:1711.05101, with a rate that is controlled):
      d = clip(s + gain * 0.25 * (kl / target - 1), 0, 1)
      s <- clip(s + gain * 0.15 * (kl / aimed - 1), 0, 1), but not upwards where d is at its bound
  A small adapter's KL grows with the square of its scale, so d acts at once and with a strength
  that is known; the sum s learns what each iteration's updates add. `aimed` is the target of the
  iteration before, which this KL was steered to. Where the target changes s is multiplied by
  sqrt(aimed / target): an update of the same length is so much larger a part of the smaller
  adapter. The error is not taken in logarithms: a batch's KL is noisy, and it is its mean that is
  to be on target.
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
DECAY_NOW = 0.25
DECAY_SUM = 0.15
DECAY_MAX = 1.0
"""Above what holds a policy whose updates double its KL of 0.01 in an iteration (about 0.4)."""
LR_FACTOR = 1.5

Schedule = Literal["phased", "constant", "linear"]
Actuator = Literal["decay", "reward", "lr", "none"]


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
    decay: float = 0.0
    """What the adapter is to be scaled down by, as exp(-decay)."""
    decay_sum: float = 0.0
    aimed: float = 0.0
    """The target that `decay` was set for; 0 before the first step."""

    def step(self, kl: float, target: float) -> "KLController":
        """The controller after an iteration whose mean KL (k3, nats per token) was `kl`."""
        if not math.isfinite(kl):
            return self
        if self.actuator == "decay":
            return self._decayed(kl, target)
        if self.aimed:  # of a run that was resumed with another actuator
            self = replace(self, decay=0.0, decay_sum=0.0, aimed=0.0)
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

    def _decayed(self, kl: float, target: float) -> "KLController":
        aimed = self.aimed or target
        before = _bounded(self.decay_sum * math.sqrt(aimed / target))
        decay = _bounded(before + self.gain * DECAY_NOW * (kl / target - 1))
        after = _bounded(before + self.gain * DECAY_SUM * (kl / aimed - 1))
        if decay == DECAY_MAX:  # a jump is answered by d alone, s would overshoot
            after = min(before, after)
        return replace(self, decay=decay, decay_sum=after, aimed=target)

    @property
    def penalty(self) -> float:
        """Weight of the per-completion KL in the shaped reward."""
        return self.beta if self.actuator == "reward" else 0.0


def _bounded(decay: float) -> float:
    return min(max(decay, 0.0), DECAY_MAX)
