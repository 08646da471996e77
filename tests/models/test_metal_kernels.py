"""Kernels of Metal that have no gradient are kept out of the training, seen from a CPU."""

import mlx.core as mx
import pytest

from bench.shapes import NoTokenizer
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Prompt
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.families import kernels
from tests.helpers.decoders import actor_on, small_decoder
from tests.helpers.groups import group_of


def test_a_state_never_steps_by_a_single_token_in_an_update() -> None:
    group, decoder = group_of(), Decoder(small_decoder("mamba2"))
    prompt_1S, rows_KT = mx.array([group.prompt_ids]), group.tokens_KT
    assert decoder.embed(prompt_1S, rows_KT[:, :1]).h_rows.shape[1] == 2
    found = decoder.forward(prompt_1S, rows_KT[:, :1])[1]
    expected = decoder.forward(prompt_1S, rows_KT)[1][:, :1]
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, atol=1e-5)


def test_answers_are_sampled_in_eval_mode_and_the_actor_trains_on() -> None:
    actor, modes = actor_on(small_decoder("qwen3_5")), set[bool]()
    prompts, sampling = [Prompt("p", (), (1, 2, 3))], Sampling(1, 2)

    def note(done: int, total: int, token: int) -> None:
        modes.update(module.training for _, module in actor.named_modules() if token)

    rollout(actor, NoTokenizer(), frozenset(), prompts, sampling, 0, "test", on_token=note)
    assert modes == {False}
    assert all(module.training for _, module in actor.named_modules())


def test_a_family_without_gradients_on_metal_is_refused_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_decoder("rwkv7")
    kernels.check_gradient(model)
    monkeypatch.setattr(kernels, "device_name", lambda: "metal")
    with pytest.raises(InputError, match="'rwkv7' is not supported: its kernels on Metal"):
        kernels.check_gradient(model)
