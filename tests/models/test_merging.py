"""A LoRA merged for a rollout: what is sampled from, and that the shared weights come back."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_grpo.backend.precision import precision_for
from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.stopping import StopRequested
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.grpo.learner import Learner, first_state
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.lora import add_lora, lora_modules, lora_parameters, set_parameters
from mlx_grpo.models.merging import merged, merged_for_rollout
from mlx_grpo.training.setup import load_learner

TOKENS = mx.array([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def dense_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form in which a LoRA is merged."""
    monkeypatch.setenv("MLX_GRPO_PRECISION", "fp32")
    monkeypatch.setenv("MLX_GRPO_WEIGHTS", "dense")


@pytest.fixture(scope="module")
def directory(sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in 4 bits."""
    out = tmp_path_factory.mktemp("merging") / "sft-4bit"
    convert_sft(locate(str(sft)), out, Quantization(4, 32), None)
    return out


@pytest.fixture
def packed(directory: Path, tmp_path: Path) -> Backbone:
    """It, loaded, in files of its own."""
    return load_backbone(Path(shutil.copytree(directory, tmp_path / "sft-4bit")))


def moved(model: nn.Module) -> nn.Module:
    """With a LoRA that does something."""
    actor = add_lora(model, rank=4, scale=2.0, seed=0)
    drawn = {n: mx.random.normal(v.shape, key=key(1, n)) for n, v in lora_parameters(actor).items()}
    set_parameters(actor, drawn)
    return actor


def bits(model: nn.Module) -> dict[str, bytes]:
    return {n: np.asarray(v).tobytes() for n, v in tree_flatten(model.parameters())}


def test_a_merged_policy_gives_the_logits_of_its_lora_and_the_weights_come_back(
    packed: Backbone,
) -> None:
    actor, before = moved(packed.model), bits(packed.model)
    wanted = actor(TOKENS)
    assert mx.abs(wanted - packed.model(TOKENS)).max().item() > 0.1
    mx.eval(wanted)
    with merged_for_rollout(packed, actor) as model:
        assert not lora_modules(model)
        assert mx.abs(model(TOKENS) - wanted).max().item() < 1e-3
        assert bits(packed.model) != before  # no copy: these are the same arrays
    assert bits(packed.model) == before
    assert mx.array_equal(actor(TOKENS), wanted)


@pytest.mark.parametrize("failure", [StopRequested, KeyboardInterrupt, MemoryError])
def test_the_weights_come_back_however_a_rollout_ends(
    packed: Backbone, failure: type[BaseException]
) -> None:
    actor, before = moved(packed.model), bits(packed.model)
    with pytest.raises(failure), merged_for_rollout(packed, actor):
        raise failure
    assert bits(packed.model) == before


def test_the_weights_come_back_when_merging_itself_fails(packed: Backbone) -> None:
    actor, before = moved(packed.model), bits(packed.model)
    lora_modules(actor)[-1][1].lora_a = mx.zeros((1, 1))  # does not fit
    with pytest.raises(ValueError, match="matmul"), merged_for_rollout(packed, actor):
        pass
    assert bits(packed.model) == before


def test_a_merge_takes_the_packed_weights_and_no_copy(directory: Path) -> None:
    backbone = load_backbone(directory)
    actor = moved(backbone.model)
    mx.eval(actor.parameters())
    layers = [layer.linear.weight.nbytes for _, layer in lora_modules(actor)]
    before = mx.get_active_memory()
    with merged_for_rollout(backbone, actor):
        inside = mx.get_active_memory() - before
    assert 0 < inside < 0.5 * sum(layers)
    mx.synchronize()  # CUDA frees what it no longer needs when its work is done
    assert mx.get_active_memory() == before


def test_without_packed_weights_the_lora_stays_beside(sft: Path) -> None:
    backbone = load_backbone(sft)
    actor, before = moved(backbone.model), bits(backbone.model)
    with merged_for_rollout(backbone, actor) as model:
        assert len(lora_modules(model)) == len(lora_modules(actor))
        assert bits(backbone.model) == before
        assert mx.array_equal(model(TOKENS), actor(TOKENS))


def test_weights_in_packed_form_are_sampled_from_as_they_are(directory: Path) -> None:
    backbone = load_backbone(directory, precision_for(dense=False))
    actor = moved(backbone.model)
    with merged_for_rollout(backbone, actor) as model:
        assert model is actor
    with merged_for_rollout(load_backbone(directory), backbone.model) as model:
        assert model is backbone.model  # no LoRA


def test_a_fresh_lora_is_sampled_from_without_merging_it(packed: Backbone) -> None:
    (packed.path / "model.safetensors").unlink()  # not even read
    actor = add_lora(packed.model, rank=4, scale=2.0, seed=0)
    with merged_for_rollout(packed, actor) as model:
        assert mx.array_equal(model(TOKENS), actor(TOKENS))
        assert not lora_modules(model)


def test_only_layers_that_were_quantized_are_merged(packed: Backbone) -> None:
    stored = packed.packed()
    first = stored.layers[0].self_attn
    first.q_proj = nn.Linear(32, 32, bias=False)
    actor, before = moved(packed.model), bits(packed.model)
    wanted = actor(TOKENS)
    mx.eval(wanted)
    with merged(actor, stored) as model:
        assert [n for n, _ in lora_modules(model)] == ["model.layers.0.self_attn.q_proj"]
        assert mx.abs(model(TOKENS) - wanted).max().item() < 1e-3
    assert bits(packed.model) == before


@pytest.mark.parametrize("change", ["rewritten", "replaced", "gone"])
def test_weights_that_changed_on_disk_are_never_taken_for_those_in_memory(
    packed: Backbone, change: str
) -> None:
    file = packed.path / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if change == "rewritten":
        file.write_bytes(content[:-1] + b"x")
    elif change == "replaced":
        shutil.copy(packed.path / "config.json", file)
    before = bits(packed.model)
    actor = moved(packed.model)
    complaint = "changed while they were in use"
    with pytest.raises(InputError, match=complaint), merged_for_rollout(packed, actor):
        pass
    assert bits(packed.model) == before


@pytest.fixture
def learner(packed: Backbone, train_arguments: dict[str, Any], tmp_path: Path) -> Learner:
    """A run on it whose reward is a function."""
    file = tmp_path / "rewards.py"
    file.write_text("def short(completions): return [-len(c) for c in completions]")
    own = {"actor_model": str(packed.path), "rm_model": "none", "reward": (f"{file}:short",)}
    found = load_learner(train_config(**{**train_arguments, **own}), Console(quiet=True))
    actor = moved(found.roles.backbone.model)
    set_parameters(found.roles.actor.model, lora_parameters(actor))
    return found


def test_nothing_but_a_rollout_sees_a_merged_weight(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_grpo.grpo import evaluate, iteration

    backbone = learner.roles.backbone
    before, seen = bits(backbone.model), []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **named: Any) -> Any:
            seen.append((name, bits(backbone.model) == before))
            return real(*args, **named)

        monkeypatch.setattr(module, name, watched)

    for name in ("rollout", "kl_to_reference", "update"):
        watch(iteration, name)
    for name in ("rollout", "kl_to_reference", "perplexity"):
        watch(evaluate, name)
    watch(type(learner.evaluator.rewards), "__call__")
    iterate(learner, first_state(learner.config), Console(quiet=True))
    learner.evaluator(learner.roles.actor)
    assert {name for name, _ in seen} >= {
        "rollout",
        "kl_to_reference",
        "update",
        "__call__",
        "perplexity",
    }
    assert all(frozen == (name != "rollout") for name, frozen in seen)
    assert bits(backbone.model) == before


def test_a_rollout_that_is_stopped_leaves_the_frozen_weights(learner: Learner) -> None:
    before, calls = bits(learner.roles.backbone.model), []

    def stop_while_decoding() -> None:
        calls.append(1)
        if len(calls) == 8:
            raise StopRequested

    with pytest.raises(StopRequested):
        iterate(learner, first_state(learner.config), Console(quiet=True), stop_while_decoding)
    assert bits(learner.roles.backbone.model) == before


def test_answers_are_those_of_the_lora_beside_the_weights(learner: Learner) -> None:
    def answers(found: Learner) -> list[tuple[int, ...]]:
        state = first_state(found.config)
        groups = iterate(found, state, Console(quiet=True)).groups
        return [c.token_ids for g in groups for c in g.completions]

    start = lora_parameters(learner.roles.actor.model)
    with_merge = answers(learner)
    set_parameters(learner.roles.actor.model, start)
    packed = replace(learner.roles.backbone.precision, dense=False)  # nothing else asks
    roles = replace(learner.roles, backbone=replace(learner.roles.backbone, precision=packed))
    assert answers(replace(learner, roles=roles)) == with_merge
