"""Staged forward and backward against the model's own forward and plain value_and_grad."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from bench.families import FAMILIES
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import TrainingGroup
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Clip, LossInputs, clipped_surrogate, token_weights
from mlx_grpo.models.backbone import share
from mlx_grpo.models.decoder import Decoder, shift_right
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from tests.helpers.groups import LENGTHS, PROMPT, actor_of, group_of, staged_gradients
from tests.helpers.tiny import VOCABULARY, tiny_model


def whole_sequences(group: TrainingGroup) -> mx.array:
    prompts = mx.broadcast_to(mx.array([group.prompt_ids]), (len(LENGTHS), PROMPT))
    return mx.concatenate([prompts, group.tokens_KT], axis=1)


def plain_logps(model, group: TrainingGroup) -> mx.array:  # type: ignore[no-untyped-def]
    logits = model(whole_sequences(group)[:, :-1])[:, PROMPT - 1 :].astype(mx.float32)
    picked = mx.take_along_axis(logits, group.tokens_KT[..., None], axis=-1)[..., 0]
    return picked - mx.logsumexp(logits, axis=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_give_the_logits_of_the_model_itself(family: str) -> None:
    model, group = actor_of(family), group_of()
    expected = model(whole_sequences(group)[:, :-1])[:, PROMPT - 1 :]
    decoder = Decoder(model)
    hidden = shift_right(*decoder.forward(mx.array([group.prompt_ids]), group.tokens_KT))
    assert mx.abs(decoder.head(hidden) - expected).max().item() < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_staged_gradients_equal_plain_value_and_grad(family: str, level: str) -> None:
    model, group, clip = actor_of(family), group_of(), Clip(level=level)  # type: ignore[arg-type]
    weights = token_weights(group.mask_KT, "sequence", len(LENGTHS), sum(LENGTHS), max(LENGTHS))
    parameters = lora_parameters(model)

    def loss(values: dict[str, mx.array]) -> mx.array:
        set_parameters(model, values)
        logp = plain_logps(model, group)
        inputs = LossInputs(group.sampled_logp_KT, group.advantages_K, group.mask_KT, weights)
        return clipped_surrogate(logp, inputs, clip)[0]

    _, expected = mx.value_and_grad(loss)(parameters)
    set_parameters(model, parameters)
    got, logp = staged_gradients(Decoder(model), group, weights, clip, 1.0)
    worst = max((mx.abs(got[n] - g).max() / mx.abs(g).max()).item() for n, g in expected.items())
    print(f"{family} {level}: largest relative gradient difference {worst:.1e}")
    assert got.keys() == expected.keys()
    assert worst < 1e-4
    assert mx.abs((logp - plain_logps(model, group)) * group.mask_KT).max().item() < 2e-5


def test_parameters_are_back_in_place_after_a_backward() -> None:
    model, group = actor_of("llama"), group_of()
    before = {n: v.tolist() for n, v in lora_parameters(model).items()}
    weights = token_weights(group.mask_KT, "token", len(LENGTHS), sum(LENGTHS), max(LENGTHS))
    staged_gradients(Decoder(model), group, weights, Clip(), 1.0)
    assert {n: v.tolist() for n, v in lora_parameters(model).items()} == before


def test_blocks_below_the_first_lora_are_not_differentiated() -> None:
    model = add_lora(tiny_model("gemma3_text"), rank=2, scale=2.0, seed=1, blocks=2)
    group = group_of()
    weights = token_weights(group.mask_KT, "token", len(LENGTHS), sum(LENGTHS), max(LENGTHS))
    gradients, _ = staged_gradients(Decoder(model), group, weights, Clip(), 1.0)
    assert {name.split(".")[2] for name in gradients} == {"5", "6"}


def test_log_probs_do_not_depend_on_padding_or_neighbours() -> None:
    decoder, group = Decoder(actor_of("llama")), group_of()
    prompt = mx.array([group.prompt_ids])
    together = token_logps(decoder, prompt, group.tokens_KT, group.mask_KT, 0.7)
    for row, length in enumerate(LENGTHS):
        tokens = group.tokens_KT[row : row + 1, :length]
        alone = token_logps(decoder, prompt, tokens, mx.ones(tokens.shape), 0.7)
        assert mx.abs(together[row, :length] - alone[0]).max().item() < 1e-5
        assert (together[row, length:] == 0).all().item()


def unique_bytes(*models: nn.Module) -> int:
    """Of the parameters of several trees, shared arrays counted once."""
    arrays = {id(v): v for m in models for _, v in tree_flatten(m.parameters())}
    return sum(a.nbytes for a in arrays.values())


def test_roles_share_the_arrays_of_one_backbone() -> None:
    model = tiny_model("llama")
    twin, actor = share(model), add_lora(model, rank=2, scale=2.0, seed=1)
    adapter_bytes = sum(v.nbytes for v in lora_parameters(actor).values())
    assert unique_bytes(model, twin) == unique_bytes(model)
    assert unique_bytes(model, twin, actor) == unique_bytes(model) + adapter_bytes


def test_a_model_that_runs_its_blocks_twice_is_refused() -> None:
    from mlx_lm.models import nanbeige

    args = nanbeige.ModelArgs("nanbeige", 16, 1, 32, 2, 2, 1e-5, VOCABULARY, num_loops=2)
    with pytest.raises(InputError, match="'nanbeige' is not supported: it calls a block 2 times"):
        Decoder(nanbeige.Model(args))


def test_a_mask_wider_than_the_cache_is_refused() -> None:
    from mlx_lm.models import plamo3

    args = plamo3.ModelArgs(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        window_size=8,
        sliding_window_pattern=2,
        intermediate_size=32,
        vocab_size=VOCABULARY,
    )
    with pytest.raises(InputError, match=r"'plamo3' .* 9 tokens, its caches keep 8"):
        Decoder(plamo3.Model(args))
