"""A tiny actor and a group of completions to take gradients of."""

import mlx.core as mx

from mlx_grpo.core.rng import key
from mlx_grpo.core.types import TrainingGroup
from mlx_grpo.grpo.update import backward_pass, forward_pass
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from tests.helpers.tiny import VOCABULARY, tiny_model

PROMPT, LENGTHS = 11, (9, 4, 1)


def actor_of(family: str):  # type: ignore[no-untyped-def]
    """A tiny model with a LoRA that has left its starting point."""
    actor = add_lora(tiny_model(family), rank=4, scale=2.0, seed=1)
    moved = {
        n: v if n.endswith("lora_a") else 0.1 * mx.random.normal(v.shape, key=key(2, n))
        for n, v in lora_parameters(actor).items()
    }
    set_parameters(actor, moved)
    return actor


def group_of(seed: int = 3) -> TrainingGroup:
    """A prompt and three completions of different length, with ratios away from one."""
    shape = (len(LENGTHS), max(LENGTHS))
    prompt = mx.random.randint(0, VOCABULARY, (PROMPT,), key=key(seed, "prompt"))
    tokens = mx.random.randint(0, VOCABULARY, shape, key=key(seed, "tokens"))
    mask = (mx.arange(shape[1])[None] < mx.array(LENGTHS)[:, None]).astype(mx.float32)
    old = -5 + 0.5 * mx.random.normal(shape, key=key(seed, "old"))
    return TrainingGroup(
        tuple(prompt.tolist()), tokens, mask, old * mask, old * mask, mx.array([1.0, -0.7, 0.2])
    )


def staged_gradients(decoder, group, weights_KT, clip, temperature=1.0):  # type: ignore[no-untyped-def]
    """(gradients, log-probs [K, T]) of one group."""
    ahead = forward_pass(decoder, group, temperature)
    return backward_pass(decoder, group, ahead, weights_KT, clip)[2], ahead.logp_KT
