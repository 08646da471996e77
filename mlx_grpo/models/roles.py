"""Actor, reference and reward model on one set of frozen weights."""

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.lora import add_lora, merge
from mlx_grpo.models.reward_model import RewardModel, load_reward_model
from mlx_grpo.models.stages import Stages


@dataclass(frozen=True)
class Roles:
    """Module trees over the same arrays; actor and reward model add small ones of their own."""

    backbone: Backbone
    actor: Stages
    reference: Stages
    reward_model: RewardModel | None

    def sampler(self) -> nn.Module:
        """The actor in the form that decodes fastest under the compute policy."""
        return sampler(self.backbone, self.actor.model)


def sampler(backbone: Backbone, adapted: nn.Module) -> nn.Module:
    """A model with LoRA layers in the form that decodes fastest: merged where weights are dense."""
    return merge(adapted) if backbone.policy.merge_lora else adapted


def assign_roles(
    backbone: Backbone, reward_model: Path | None, rank: int, scale: float, seed: int
) -> Roles:
    """Build all roles; weights that can be shared are shared.

    Raises:
        InputError: the reward model is missing or does not fit the backbone.
    """
    rm = load_reward_model(reward_model, backbone) if reward_model else None
    actor = add_lora(backbone.model, rank, scale, seed)
    actor.train()  # some model families have kernels without a gradient in eval mode
    return Roles(backbone, Stages(actor), Stages(backbone.model), rm)
