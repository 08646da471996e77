"""How often a stage waits for the device: each evaluation is a synchronisation on a GPU."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.backend import kernels
from mlx_grpo.backend.device import device_name
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Clip
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import lora_parameters
from mlx_grpo.models.optimizer import adamw_step, new_optimizer
from tests.helpers.groups import LENGTHS, actor_of, group_of, settings_with
from tests.helpers.tiny import VOCABULARY

CHUNK = 5
HEAD = Sizes(head_bytes=CHUNK * 4 * VOCABULARY)
CHUNKS = -(-sum(LENGTHS) // CHUNK)


@pytest.fixture(params=["cpu", "metal"])
def numpy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """1 where numpy overwrites the logits of each chunk and each token, and so waits for them: on a
    CPU; 0 on a GPU."""
    name = request.param
    if name == "cpu" != device_name():
        pytest.skip("this backend's arrays are not numpy's")
    monkeypatch.setattr(kernels, "device_name", lambda: name)
    return int(name == "cpu")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """How many evaluations a call makes."""
    real, calls = mx.eval, []

    def evaluate(*arrays: Any) -> None:
        calls.append(1)
        real(*arrays)

    monkeypatch.setattr(mx, "eval", evaluate)

    def count(work: Callable[[], Any]) -> int:
        calls.clear()
        work()
        return len(calls)

    return count


def test_log_probs_wait_once_a_block_and_twice_a_chunk(
    counted: Callable[[Callable[[], Any]], int], numpy: int
) -> None:
    decoder, group = Decoder(actor_of("llama"), HEAD), group_of()
    arguments = (mx.array([group.prompt_ids]), group.tokens_KT, group.mask_KT)
    found = counted(lambda: token_logps(decoder, *arguments))
    assert found == len(decoder.blocks) + CHUNKS * (2 + numpy)


def test_an_update_waits_three_times_a_block_and_three_times_a_chunk(
    counted: Callable[[Callable[[], Any]], int], numpy: int
) -> None:
    from mlx_grpo.grpo.update import surrogate_gradients

    decoder, group = Decoder(actor_of("llama"), HEAD), group_of()
    weights_KT = group.mask_KT / group.mask_KT.sum()
    settings = settings_with(Clip())
    old = [group.sampled_logp_KT]
    found = counted(lambda: surrogate_gradients(decoder, [group], old, [weights_KT], settings))
    cotangents = 1
    assert found == 3 * len(decoder.blocks) + CHUNKS * (3 + numpy) + cotangents


def test_a_step_of_adamw_waits_twice_where_its_arrays_are_small(
    counted: Callable[[Callable[[], Any]], int],
) -> None:
    parameters = lora_parameters(actor_of("llama"))
    assert len(parameters) == 28  # it waited for each of them once
    gradients = {n: mx.ones_like(v) for n, v in parameters.items()}
    assert counted(lambda: adamw_step(new_optimizer(1e-3, 0.0), gradients, parameters, 1.0)) == 2


def test_a_rollout_waits_for_the_blocks_of_each_prompt_and_for_no_token(
    backbone: Backbone, counted: Callable[[Callable[[], Any]], int], numpy: int
) -> None:
    from mlx_grpo.core.types import Prompt

    prompts = [Prompt(str(i), (), tuple(range(5, 20 + i))) for i in range(3)]
    sampling, blocks = Sampling(2, 6), len(backbone.model.layers)
    sample = (backbone.model, backbone.tokenizer, frozenset(), prompts, sampling, 1, "test")
    found = counted(lambda: rollout(*sample))
    caches = 1
    assert found == len(prompts) * (blocks + caches) + numpy * sampling.max_tokens
