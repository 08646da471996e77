"""Actor and reference on one set of frozen weights."""

from dataclasses import dataclass

from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import WHOLE, Decoder, Sizes
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
    backbone: Backbone, rank: int, scale: float, seed: int, sizes: Sizes = WHOLE
) -> Decoder:
    """The backbone with a fresh LoRA, which starts as the backbone itself."""
    actor = add_lora(backbone.model, rank, scale, seed)
    actor.train()  # some model families have kernels without a gradient in eval mode
    return Decoder(actor, sizes)
