"""Kept blocks give the gradients of blocks that run twice, and nothing of it stays behind."""

from dataclasses import replace

import mlx.core as mx
import pytest

from bench.families import FAMILIES
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.types import Parameters, TrainingGroup
from mlx_grpo.grpo.loss import Clip, token_weights
from mlx_grpo.grpo.update import surrogate_gradients
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from tests.helpers.groups import LENGTHS, actor_of, group_of, old_of, settings_with
from tests.helpers.tiny import tiny_model


def gradients_of(decoder: Decoder, parts: list[TrainingGroup]) -> Parameters:
    weights = [
        token_weights(p.mask_KT, "sequence", len(LENGTHS), sum(LENGTHS), max(LENGTHS))
        for p in parts
    ]
    old = [p.sampled_logp_KT for p in parts]
    return surrogate_gradients(decoder, parts, old, weights, settings_with(Clip()))[3]


def furthest(a: Parameters, b: Parameters) -> float:
    assert a.keys() == b.keys()
    return max((mx.abs(a[n] - b[n]).max() / mx.abs(b[n]).max()).item() for n in b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [1, 99])
def test_kept_blocks_give_the_same_gradients(family: str, kept: int) -> None:
    model, groups = actor_of(family), [group_of(3), group_of(4)]
    expected = gradients_of(Decoder(model), groups)
    assert furthest(gradients_of(Decoder(model, Sizes(kept_blocks=kept)), groups), expected) < 1e-5


def test_kept_blocks_give_the_same_gradients_in_bf16() -> None:
    model = tiny_model("llama")
    apply_precision(model, Precision("cpu", dense=False, dtype=mx.bfloat16))
    actor = add_lora(model, rank=4, scale=2.0, seed=1)
    set_parameters(actor, {n: v + 0.05 for n, v in lora_parameters(actor).items()})
    expected = gradients_of(Decoder(actor), [group_of()])
    found = gradients_of(Decoder(actor, Sizes(kept_blocks=1)), [group_of()])
    assert furthest(found, expected) < 1e-5


def test_the_adapter_is_in_its_place_afterwards() -> None:
    actor = actor_of("llama")
    before = {n: v.tolist() for n, v in lora_parameters(actor).items()}
    gradients_of(Decoder(actor, Sizes(kept_blocks=1)), [group_of()])
    assert {n: v.tolist() for n, v in lora_parameters(actor).items()} == before


def test_the_backward_ends_at_the_first_block_that_can_learn() -> None:
    last = len(tiny_model("llama").layers) - 1
    actor = add_lora(tiny_model("llama"), rank=4, scale=2.0, seed=1, blocks=1)
    found = gradients_of(Decoder(actor), [replace(group_of(), sampled_logp_KT=old_of())])
    assert found and all(f".layers.{last}." in name for name in found)
