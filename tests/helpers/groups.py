"""A tiny actor and a group of completions to take gradients of."""

import math

import mlx.core as mx

from bench.shapes import move_lora
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import TrainingGroup
from mlx_grpo.grpo.loss import Clip
from mlx_grpo.grpo.update import UpdateSettings, surrogate_gradients
from mlx_grpo.models.lora import add_lora
from tests.helpers.tiny import VOCABULARY, tiny_model

PROMPT, LENGTHS = 11, (9, 4, 1)


def actor_of(family: str):  # type: ignore[no-untyped-def]
    """A tiny model with a LoRA that has left its starting point."""
    actor = add_lora(tiny_model(family), rank=4, scale=2.0, seed=1)
    move_lora(actor, 0.1, seed=2)
    return actor


def group_of(seed: int = 3) -> TrainingGroup:
    """A prompt and three completions of different length."""
    shape = (len(LENGTHS), max(LENGTHS))
    prompt = mx.random.randint(0, VOCABULARY, (PROMPT,), key=key(seed, "prompt"))
    tokens = mx.random.randint(0, VOCABULARY, shape, key=key(seed, "tokens"))
    mask = (mx.arange(shape[1])[None] < mx.array(LENGTHS)[:, None]).astype(mx.float32)
    advantages = mx.array([1.0, -0.7, 0.2])
    return TrainingGroup(0, tuple(prompt.tolist()), tokens, mask, old_of(seed), advantages)


def old_of(seed: int = 3) -> mx.array:
    """Old log-probs of the group with ratios away from one."""
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (mx.arange(shape[1])[None] < mx.array(LENGTHS)[:, None]).astype(mx.float32)
    return (-5 + 0.5 * mx.random.normal(shape, key=key(seed, "old"))) * mask


def staged_gradients(decoder, group, weights_KT, clip, temperature=1.0):  # type: ignore[no-untyped-def]
    """(gradients, log-probs [K, T]) of one group whose sampled log-probs serve as old ones."""
    _, _, logps, found = surrogate_gradients(
        decoder, [group], [group.sampled_logp_KT], [weights_KT], settings_with(clip, temperature)
    )
    return found, logps[0]


def settings_with(clip: Clip, temperature: float = 1.0) -> UpdateSettings:
    """Settings of an update that differ from the usual in these."""
    return UpdateSettings(
        clip=clip,
        aggregation="sequence",
        temperature=temperature,
        max_tokens=16,
        max_grad_norm=0.5,
        minibatch_size=1,
        epochs=1,
        kl_stop=math.inf,
    )
