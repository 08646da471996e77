"""A block's MLP over some tokens at a time gives what it gives over all."""

import mlx.core as mx
import pytest

from bench.families import FAMILIES
from mlx_grpo.grpo.loss import Clip, token_weights
from mlx_grpo.models.backward import Pass, States, gradients
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import lora_parameters
from tests.helpers.groups import LENGTHS, actor_of, group_of, staged_gradients

WEIGHTS = (3, sum(LENGTHS), max(LENGTHS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_gradients_and_log_probs_are_those_of_whole_blocks(family: str, tokens: int) -> None:
    model, group = actor_of(family), group_of()
    weights = token_weights(group.mask_KT, "sequence", *WEIGHTS)
    results = [
        staged_gradients(Decoder(model, sizes), group, weights, Clip())
        for sizes in (Sizes(), Sizes(mlp_tokens=tokens))
    ]
    (expected, logp), (found, chunked_logp) = results
    assert list(found) == list(expected)
    worst = max((mx.abs(found[n] - g).max() / mx.abs(g).max()).item() for n, g in expected.items())
    assert worst < 1e-5
    assert mx.abs(logp - chunked_logp).max().item() < 1e-5


def test_the_model_is_whole_again_after_a_backward_in_chunks() -> None:
    model, group = actor_of("gemma2"), group_of()
    before = {n: v.tolist() for n, v in lora_parameters(model).items()}
    mlps = [type(layer.mlp) for layer in model.layers]
    weights = token_weights(group.mask_KT, "sequence", *WEIGHTS)
    staged_gradients(Decoder(model, Sizes(mlp_tokens=2)), group, weights, Clip())
    assert {n: v.tolist() for n, v in lora_parameters(model).items()} == before
    assert [type(layer.mlp) for layer in model.layers] == mlps


def test_a_chunk_as_long_as_the_pass_changes_no_bit() -> None:
    group = group_of()
    prompt = mx.array([group.prompt_ids])
    whole, chunked = (
        Decoder(actor_of("llama"), sizes).forward(prompt, group.tokens_KT)
        for sizes in (Sizes(), Sizes(mlp_tokens=64))
    )
    assert whole[1].tolist() == chunked[1].tolist()


def test_chunks_bound_the_memory_of_a_wide_mlp() -> None:
    from mlx_lm.models import llama

    from mlx_grpo.models.lora import add_lora

    arguments = {"hidden_size": 32, "intermediate_size": 8192, "num_attention_heads": 2}
    small = {"num_hidden_layers": 1, "vocab_size": 300, "rms_norm_eps": 1e-5}
    model = llama.Model(llama.ModelArgs(model_type="llama", **arguments, **small))
    model.freeze()
    actor = add_lora(model, rank=2, scale=2.0, seed=0)
    mx.eval(actor.parameters())
    prompt, rows = mx.zeros((1, 64), mx.int32), mx.zeros((4, 64), mx.int32)
    peaks = [_backward_peak(Decoder(actor, sizes), prompt, rows) for sizes in CUTS]
    assert peaks[1] < 0.5 * peaks[0]


CUTS = (Sizes(), Sizes(mlp_tokens=32))


def _backward_peak(decoder: Decoder, prompt_1S: mx.array, rows_KT: mx.array) -> int:
    held = 0

    def ones(states: list[States]) -> list[States]:
        nonlocal held
        wanted = [(mx.ones_like(h_prompt), mx.ones_like(h_rows)) for h_prompt, h_rows in states]
        mx.eval(wanted)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        return wanted

    gradients(decoder, [Pass(prompt_1S, rows_KT)], ones)
    return mx.get_peak_memory() - held
