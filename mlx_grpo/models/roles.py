"""Actor and reference on one set of frozen weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import WHOLE, Decoder, Sizes
from mlx_grpo.models.families.kernels import check_gradient
from mlx_grpo.models.lora import add_lora


@dataclass(frozen=True)
class Roles:
    """Module trees over the same arrays: the actor adds its LoRA, the reference adds nothing.

    A reward adapter is a third tree over them (`reward_model.py`).
    """

    backbone: Backbone
    actor: Decoder
    reference: Decoder


def new_actor(
    backbone: Backbone,
    rank: int,
    scale: float,
    seed: int,
    sizes: Sizes = WHOLE,
    layers: int = 0,
    expert_rank: int = 0,
    targets: Sequence[str] = (),
) -> Decoder:
    """The backbone with a fresh LoRA, which starts as the backbone itself.

    Args:
        layers: how many of the last blocks get one; 0 means all.
        expert_rank: of the LoRA on each expert of a mixture; 0 leaves experts without.
        targets: which layers get one; empty means all.

    Raises:
        InputError: nothing of this model can be trained on this device, or it does not have a
            target.
    """
    check_gradient(backbone.model)
    actor = add_lora(backbone.model, rank, scale, seed, layers, expert_rank, targets)
    actor.train()  # some model families have kernels without a gradient in eval mode
    return Decoder(actor, sizes)
