"""What an iteration works with, and the constants its stages take from the settings."""

import math
from dataclasses import dataclass

import mlx.optimizers as optim

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.core.types import Prompt
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.grpo.kl_controller import KLController, kl_target
from mlx_grpo.grpo.loss import Clip
from mlx_grpo.grpo.rollout import Sampling
from mlx_grpo.grpo.state import RunState
from mlx_grpo.grpo.update import UpdateSettings
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.roles import Roles
from mlx_grpo.plan.memory import Plan
from mlx_grpo.rewards.normalizer import ScoreNormalizer


@dataclass(frozen=True)
class Learner:
    """What a run works with; only the actor's arrays and the optimizer's state change inside."""

    config: TrainConfig
    plan: Plan
    roles: Roles
    prompts: list[Prompt]
    evaluator: Evaluator
    optimizer: optim.AdamW
    ranks: Ranks = ALONE


def first_state(config: TrainConfig) -> RunState:
    """The state before the first iteration."""
    controller = KLController(
        actuator=config.kl_control,
        beta=config.kl_beta,
        learning_rate=config.learning_rate,
        gain=config.kl_gain,
        beta_min=config.kl_beta_min,
        beta_max=config.kl_beta_max,
        learning_rate_min=config.kl_lr_min,
        learning_rate_max=config.kl_lr_max,
    )
    return RunState(controller, ScoreNormalizer(config.reward_alpha, config.reward_clip))


def sampling(config: TrainConfig, k: int, plan: Plan) -> Sampling:
    """How this run samples k answers per prompt; never more rows at a time than a rollout has."""
    rows = plan.choice.decode_rows
    return Sampling(k, config.max_completion_length, config.temperature, rows)


def target_at(config: TrainConfig, iteration: int) -> float:
    """KL target of an iteration, counted from 0."""
    return kl_target(
        iteration, config.num_iterations, config.kl_schedule, config.kl_targets, config.kl_phases
    )


def update_settings(config: TrainConfig, target: float, plan: Plan) -> UpdateSettings:
    """Constants of an iteration's update."""
    return UpdateSettings(
        clip=Clip(
            config.clip_range, config.clip_range_high or config.clip_range, config.ratio_level
        ),
        aggregation=config.loss_aggregation,
        temperature=config.temperature,
        max_tokens=config.max_completion_length,
        max_grad_norm=config.max_grad_norm,
        minibatch_size=config.minibatch_size,
        epochs=config.epochs,
        kl_stop=config.kl_stop_factor * target if config.kl_stop_factor else math.inf,
        rows_per_pass=plan.choice.sizes.rows,
    )


def policy_at(parts: Learner, iteration: int) -> Decoder:
    """What is evaluated after so many iterations: before the first update the actor is the
    reference, so its KL needs no measuring."""
    return parts.roles.actor if iteration else parts.roles.reference
