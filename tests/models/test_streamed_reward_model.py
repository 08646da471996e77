"""A reward model read anew for each scoring scores as one that stays."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from bench.decoders import decoder_config
from mlx_grpo.backend.precision import Precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.models import streamed_reward_model
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.reward_model import (
    REWARD_CONFIG,
    REWARD_HEAD,
    load_reward_model,
    reward_decoder,
)
from mlx_grpo.models.streamed_reward_model import open_streamed
from tests.helpers.decoders import Doubling, small_decoder
from tests.helpers.tiny import write_model

DENSE = Precision("cpu", dense=True, dtype=mx.float32)
PACKED = Precision("cpu", dense=False, dtype=mx.float32)


@pytest.fixture(params=["llama", "gemma", "qwen2"])
def judge(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny reward model of its own, not quantized."""
    return as_reward_model(write_model(tmp_path / "rm", request.param, seed=5))


def as_reward_model(path: Path) -> Path:
    """The directory of a model, now with a head beside it."""
    (path / REWARD_CONFIG).write_text(json.dumps({"kind": "full", "input": "policy_token_ids"}))
    head = mx.random.normal((1, 32), key=key(1, "head"))
    mx.save_safetensors(str(path / REWARD_HEAD), {"weight": head})
    return path


def groups() -> list[Group]:
    """Three groups of answers of different lengths."""
    answers = [tuple(range(3, 3 + n)) for n in (4, 1, 7)]
    completions = tuple(Completion(ids, "", "stop", ()) for ids in answers)
    return [Group(Prompt(str(i), (), tuple(range(9 + i))), completions) for i in range(3)]


def test_weights_that_change_between_two_scorings_are_refused(judge: Path) -> None:
    streamed = open_streamed(judge, DENSE, Sizes(), 0)
    streamed.score_groups(groups())
    write_model(judge, seed=6)
    with pytest.raises(InputError, match="rm: the weights were changed while they were in use"):
        streamed.score_groups(groups())


@pytest.mark.parametrize("hidden_bytes", [0, 1 << 20])
@pytest.mark.parametrize("policy", [DENSE, PACKED])
def test_scores_are_those_of_a_resident_model(
    judge: Path, sft: Path, hidden_bytes: int, policy: Precision
) -> None:
    resident = load_reward_model(judge, load_backbone(sft), precision=policy)
    streamed = open_streamed(judge, policy, Sizes(), hidden_bytes)
    expected = [resident.score(group) for group in groups()]
    for found in (streamed.score_groups(groups()), [streamed.score(g) for g in groups()]):
        for a, b in zip(expected, found, strict=True):
            assert b == pytest.approx(a, abs=1e-5)


@pytest.mark.parametrize("name", ["lfm2", "gemma4_text shared", "mamba2"])
def test_blocks_that_share_more_than_hidden_states_score_as_in_a_resident_model(
    name: str, tmp_path: Path
) -> None:
    judge = tmp_path / "rm"
    judge.mkdir()
    weights = dict(tree_flatten(small_decoder(name).parameters()))
    mx.save_safetensors(str(judge / "model.safetensors"), weights, metadata={"format": "mlx"})
    (judge / "config.json").write_text(json.dumps(decoder_config(name)))
    as_reward_model(judge)
    resident = load_reward_model(judge, None, precision=DENSE)
    streamed = open_streamed(judge, DENSE, Sizes(), 1 << 20)
    for group, found in zip(groups(), streamed.score_groups(groups()), strict=True):
        assert found == pytest.approx(resident.score(group), abs=1e-5)


def test_a_model_whose_final_norm_is_not_found_is_refused_as_it_is_opened(
    judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_norm(self: Decoder, h_BTD: mx.array) -> mx.array:
        raise InputError("it has no final norm")

    monkeypatch.setattr(Decoder, "norm", no_norm)
    for opened in (
        lambda: load_reward_model(judge, None, precision=DENSE),
        lambda: open_streamed(judge, DENSE, Sizes(), 0),
        lambda: reward_decoder(small_decoder("llama")),
    ):
        with pytest.raises(InputError, match="no final norm"):
            opened()


def test_a_model_that_changes_states_between_its_blocks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = as_reward_model(write_model(tmp_path / "rm", "llama"))
    read = streamed_reward_model.load_unchanged

    def doubling(*given: Any) -> nn.Module:
        model = read(*given)
        model.model.__class__ = Doubling
        return model

    open_streamed(judge, DENSE, Sizes(), 0)
    monkeypatch.setattr(streamed_reward_model, "load_unchanged", doubling)
    for precision in (DENSE, PACKED):
        with pytest.raises(InputError, match="is not supported: hidden states differ by"):
            open_streamed(judge, precision, Sizes(), 0)


def test_a_head_of_two_layers_scores_as_in_a_resident_model(judge: Path, sft: Path) -> None:
    shapes = {"tanh.weight": (8, 32), "tanh.bias": (8,), "weight": (1, 8), "bias": (1,)}
    head = {name: mx.random.normal(shape, key=key(1, name)) for name, shape in shapes.items()}
    mx.save_safetensors(str(judge / REWARD_HEAD), head)
    resident = load_reward_model(judge, load_backbone(sft), precision=DENSE)
    streamed = open_streamed(judge, DENSE, Sizes(), 1 << 20)
    for group, found in zip(groups(), streamed.score_groups(groups()), strict=True):
        assert found == pytest.approx(resident.score(group), abs=1e-5)
    mx.save_safetensors(str(judge / REWARD_HEAD), {**head, "weight": mx.zeros((1, 9))})
    with pytest.raises(InputError, match=r"'weight' has width 9, not that of 'tanh\.weight'"):
        load_reward_model(judge, load_backbone(sft))


def test_quantized_weights_give_the_scores_of_the_dense_copy_that_would_stay(
    judge: Path, sft: Path, tmp_path: Path
) -> None:
    model, config = load_model(judge)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(judge / "model.safetensors"), weights, metadata={"format": "mlx"})
    config["quantization"] = {"group_size": 32, "bits": 4}
    (judge / "config.json").write_text(json.dumps(config))
    resident = load_reward_model(judge, load_backbone(sft), precision=DENSE)
    streamed = open_streamed(judge, DENSE, Sizes(), 1 << 20)
    for group, found in zip(groups(), streamed.score_groups(groups()), strict=True):
        assert found == pytest.approx(resident.score(group), abs=1e-4)


def test_nothing_of_it_stays_in_memory(judge: Path) -> None:
    streamed = open_streamed(judge, DENSE, Sizes(), 1 << 20)
    streamed.score_groups(groups())
    mx.synchronize()  # CUDA frees what it no longer needs when its work is done
    mx.clear_cache()
    before = mx.get_active_memory()
    streamed.score_groups(groups())
    mx.synchronize()
    assert mx.get_active_memory() == before
