"""Adapters on disk: read by mlx-lm's own command, refused when damaged, exact when not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.backend.precision import Asked, precision_for
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.lora import (
    add_lora,
    load_adapter,
    lora_parameters,
    save_adapter,
    scale_adapter,
    set_parameters,
)
from mlx_grpo.run.directory import save_named_adapter
from tests.helpers.paths import WITHOUT_TORCH
from tests.helpers.tiny import tiny_model

RANK, SCALE = 4, 2.0
NAME = "model.layers.1.mlp.up_proj.lora_b"


def trained(model: Any, blocks: int = 0) -> Any:
    """An actor whose LoRA does something."""
    actor = add_lora(model, RANK, SCALE, seed=1, blocks=blocks)
    moved = {
        n: v + 0.3 * mx.random.normal(v.shape, key=key(2, n))
        for n, v in lora_parameters(actor).items()
    }
    set_parameters(actor, moved)
    return actor


def logits(model: Any) -> mx.array:
    """Logits of a fixed text."""
    return model(mx.array([[257, 60, 61, 62, 10, 11]])).astype(mx.float32)


@pytest.fixture
def saved(backbone: Backbone, tmp_path: Path) -> Path:
    """A good adapter."""
    save_adapter(tmp_path / "adapter", trained(backbone.model))
    return tmp_path / "adapter"


def test_mlx_lm_generates_with_the_adapter_of_a_run(
    sft: Path, backbone: Backbone, tmp_path: Path
) -> None:
    save_named_adapter(tmp_path, "best", trained(backbone.model), step=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]
    arguments = ["--model", str(sft), "--adapter-path", str(tmp_path / "best"), "--prompt", "hi"]
    given = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", *arguments, "--max-tokens", "4"],
        env={**given, "PYTHONPATH": f"{WITHOUT_TORCH}{os.pathsep}{given.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Generation: " in done.stdout


def test_mlx_lm_computes_what_the_actor_computes(sft: Path, tmp_path: Path) -> None:
    import mlx_lm

    exact = load_backbone(sft, precision_for(dense=True, wanted=Asked("fp32"))).model
    actor = trained(exact)
    save_named_adapter(tmp_path, "best", actor, step=1)
    model, _ = mlx_lm.load(str(sft), adapter_path=str(tmp_path / "best"))
    assert mx.allclose(logits(model), logits(actor), atol=1e-5).item()
    assert not mx.allclose(logits(model), logits(exact), atol=0.1).item()


@pytest.mark.parametrize("blocks", (0, 1))
def test_a_saved_adapter_comes_back_bit_for_bit(
    backbone: Backbone, tmp_path: Path, blocks: int
) -> None:
    actor = trained(backbone.model, blocks)
    save_adapter(tmp_path / "adapter", actor)
    again = load_adapter(backbone.model, tmp_path / "adapter")
    before, after = lora_parameters(actor), lora_parameters(again)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[n], after[n]).item() for n in before)
    assert mx.array_equal(logits(again), logits(actor)).item()
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]


def test_a_new_best_replaces_the_old_one_whole(backbone: Backbone, tmp_path: Path) -> None:
    save_named_adapter(tmp_path, "best", add_lora(backbone.model, RANK, SCALE, seed=9), step=1)
    (tmp_path / "best" / "stale.txt").write_text("old")
    actor = trained(backbone.model)
    save_named_adapter(tmp_path, "best", actor, step=1)
    again = load_adapter(backbone.model, tmp_path / "best")
    assert mx.array_equal(logits(again), logits(actor)).item()
    assert not (tmp_path / "best" / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def without(arrays: Parameters, name: str) -> Parameters:
    """All but one."""
    return {n: v for n, v in arrays.items() if n != name}


DAMAGE = {
    "a tensor is missing": (lambda a: without(a, NAME), rf"tensor '{NAME}' is missing"),
    "a tensor is unknown": (
        lambda a: {**a, "model.layers.9.mlp.up_proj.lora_b": a[NAME]},
        r"tensor 'model\.layers\.9\.mlp\.up_proj\.lora_b' does not fit this model",
    ),
    "a tensor has another shape": (
        lambda a: {**a, NAME: a[NAME][:, :16]},
        rf"tensor '{NAME}' does not fit this model",
    ),
    "a tensor has another rank": (
        lambda a: {**a, NAME: a[NAME][:2]},
        rf"tensor '{NAME}' does not fit this model",
    ),
    "a value is NaN": (
        lambda a: {**a, NAME: mx.where(mx.arange(a[NAME].shape[1]) == 3, mx.nan, a[NAME])},
        rf"tensor '{NAME}' holds values that are not finite",
    ),
    "a value is infinite": (
        lambda a: {**a, NAME: a[NAME] * mx.inf},
        rf"tensor '{NAME}' holds values that are not finite",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_adapter_is_refused_when(case: str, backbone: Backbone, saved: Path) -> None:
    change, complaint = DAMAGE[case]
    file = saved / "adapters.safetensors"
    save_arrays(file, change(load_arrays(file)))
    with pytest.raises(InputError, match=rf"^{file}: {complaint}"):
        load_adapter(backbone.model, saved)


@pytest.mark.parametrize("name", ("adapters.safetensors", "adapter_config.json"))
def test_a_missing_file_is_named(name: str, backbone: Backbone, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(InputError, match=rf"^{saved / name}: "):
        load_adapter(backbone.model, saved)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("adapters.safetensors", b"half", "cannot be read"),
        ("adapter_config.json", b"{", "not valid JSON"),
        ("adapter_config.json", b"{}", "field 'num_layers' is missing"),
        ("adapter_config.json", b'{"lora_parameters": {}}', "field '(num_layers|rank)' is missing"),
        (
            "adapter_config.json",
            b'{"num_layers": 2, "lora_parameters": {"rank": 4}}',
            "field 'scale' is missing",
        ),
        (
            "adapter_config.json",
            b'{"num_layers": 2, "lora_parameters": {"rank": 4, "scale": NaN}}',
            "field 'scale' must be a number, not 'nan'",
        ),
        (
            "adapter_config.json",
            b'{"num_layers": "2", "lora_parameters": {"rank": 4, "scale": 1}}',
            "field 'num_layers' must be a number, not '2'",
        ),
    ],
)
def test_a_damaged_file_is_named(
    name: str, content: bytes, complaint: str, backbone: Backbone, saved: Path
) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^{saved / name}: .*{complaint}|{name}: {complaint}"):
        load_adapter(backbone.model, saved)


def test_a_failed_load_leaves_the_backbone_untouched(saved: Path) -> None:
    model = tiny_model()
    before = logits(model)
    (saved / "adapters.safetensors").write_bytes(b"half")
    with pytest.raises(InputError):
        load_adapter(model, saved)
    assert not lora_parameters(model)
    assert mx.array_equal(logits(model), before).item()


def test_scaling_an_adapter_scales_what_it_adds(backbone: Backbone) -> None:
    actor = trained(backbone.model)
    layers = [model.model.layers[0].self_attn.q_proj for model in (backbone.model, actor)]
    x = mx.ones((1, layers[1].lora_a.shape[0]))
    added = layers[1](x) - layers[0](x)
    scale_adapter(actor, 0.25)
    assert mx.allclose(layers[1](x) - layers[0](x), 0.25 * added, atol=1e-5).item()
    assert mx.abs(added).max().item() > 0.1


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj", "v_proj"), {"self_attn.q_proj", "self_attn.v_proj"}),
        (("mlp.up_proj",), {"mlp.up_proj"}),
        (("mlp.up_proj", "up_proj"), {"mlp.up_proj"}),
    ],
)
def test_a_lora_on_named_layers_alone_is_saved_and_loaded(
    backbone: Backbone, tmp_path: Path, targets: tuple[str, ...], names: set[str]
) -> None:
    actor = add_lora(backbone.model, RANK, SCALE, seed=1, targets=targets)
    adapted = {n.split(".", 3)[3].rpartition(".")[0] for n in lora_parameters(actor)}
    assert adapted == names
    save_adapter(tmp_path / "a", actor)
    assert lora_parameters(load_adapter(backbone.model, tmp_path / "a")).keys() == (
        lora_parameters(actor).keys()
    )


@pytest.mark.parametrize("target", ["proj", "q_pro", "layers.0.self_attn.q_proj"])
def test_a_target_that_is_no_layer_is_refused_with_those_that_are(
    backbone: Backbone, target: str
) -> None:
    with pytest.raises(InputError, match=rf"--lora-target-modules: no layer '{target}'.*q_proj"):
        add_lora(backbone.model, RANK, SCALE, seed=1, targets=("v_proj", target))
