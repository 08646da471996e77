"""What an iteration works with, and the constants its stages take from the settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.optimizers as optim

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.core.types import Prompt
from mlx_grpo.data.prompts import batch_indices, prompt_weights, weighted_indices
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.grpo.kl_controller import KLController, kl_target
from mlx_grpo.grpo.loss import Clip
from mlx_grpo.grpo.lr_schedule import rate_factor
from mlx_grpo.grpo.rollout import Sampling
from mlx_grpo.grpo.state import RunState
from mlx_grpo.grpo.update import UpdateSettings
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.roles import Roles
from mlx_grpo.plan.memory import Choice
from mlx_grpo.rewards.normalizer import ScoreNormalizer


@dataclass(frozen=True)
class Learner:
    """What iterations work with; only the actor's arrays and the optimizer's state change."""

    config: TrainConfig
    choice: Choice
    """How much is worked on at a time, as planned."""
    roles: Roles
    prompts: list[Prompt]
    evaluator: Evaluator
    optimizer: optim.AdamW
    ranks: Ranks = ALONE
    tests: Mapping[str, Evaluator] = field(default_factory=dict)
    """For each file of --test-prompts, by its name in the metrics."""

    def batch(self, state: RunState) -> list[Prompt]:
        """The prompts of the next iteration."""
        seed, size = self.config.run.seed, self.config.data.batch_size
        if self.config.data.prompt_sampling == "adaptive":
            weights = prompt_weights([p.id for p in self.prompts], state.spreads)
            places = weighted_indices(seed, state.iteration, size, weights)
        else:
            places = batch_indices(seed, state.iteration, size, len(self.prompts))
        return [self.prompts[i] for i in places]

    def policy(self, iteration: int) -> Decoder:
        """What is evaluated after so many iterations: before the first update the actor is the
        reference, so its KL needs no measuring."""
        return self.roles.actor if iteration else self.roles.reference


def first_state(config: TrainConfig) -> RunState:
    """The state before the first iteration."""
    controller = KLController(
        actuator=config.kl.control,
        beta=config.kl.beta,
        learning_rate=config.optimizer.learning_rate,
        gain=config.kl.gain,
        beta_min=config.kl.beta_min,
        beta_max=config.kl.beta_max,
        learning_rate_min=config.kl.lr_min,
        learning_rate_max=config.kl.lr_max,
    )
    return RunState(controller, ScoreNormalizer(config.reward.alpha, config.reward.clip))


def sampling(config: TrainConfig, k: int, choice: Choice) -> Sampling:
    """How this run samples k completions per prompt, no more rows at a time than planned."""
    rollout = config.rollout
    return Sampling(k, rollout.max_completion_length, rollout.temperature, choice.decode_rows)


def target_at(config: TrainConfig, iteration: int) -> float:
    """KL target of an iteration, counted from 0."""
    kl = config.kl
    return kl_target(iteration, config.run.num_iterations, kl.schedule, kl.targets, kl.phases)


def learning_rate_at(config: TrainConfig, state: RunState) -> float:
    """Learning rate of the next iteration: what the controller says, times the schedule."""
    o = config.optimizer
    factor = rate_factor(
        state.iteration, config.run.num_iterations, o.lr_scheduler_type, o.warmup_ratio
    )
    return state.controller.learning_rate * factor


def update_settings(config: TrainConfig, target: float, choice: Choice) -> UpdateSettings:
    """Constants of an iteration's update."""
    o = config.optimizer
    return UpdateSettings(
        clip=Clip(o.clip_range, o.clip_range_high or o.clip_range, o.ratio_level),
        aggregation=o.loss_aggregation,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_completion_length,
        max_grad_norm=o.max_grad_norm,
        minibatch_size=o.minibatch_size,
        epochs=o.epochs,
        kl_stop=config.kl.stop_factor * target if config.kl.stop_factor else math.inf,
        rows_per_pass=choice.sizes.rows,
    )
