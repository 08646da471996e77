"""A LoRA on the experts of a mixture: exact gradients, files that mlx-lm reads, frozen routers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters

from mlx_grpo.backend import kernels
from mlx_grpo.backend.device import device_name
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.models.backbone import share
from mlx_grpo.models.backward import Pass, States, gradients
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import (
    add_lora,
    load_adapter,
    lora_modules,
    lora_parameters,
    save_adapter,
    set_parameters,
)
from mlx_grpo.models.lora_targets import coverage, lora_keys
from mlx_grpo.models.merging import merged
from tests.helpers.mixtures import (
    EXPERTS,
    INNER,
    MIXTURES,
    WIDTH,
    skip_without_kernel,
    tiny_mixture,
)

RANK, EXPERT_RANK = 4, 2
EXPERT = "model.layers.1.mlp.switch_mlp.up_proj"
PROMPT = mx.array([[257, 60, 61, 62, 63]])
ROWS = mx.array([[70, 71, 72, 73, 74, 75], [80, 81, 82, 83, 84, 85], [90, 91, 92, 93, 94, 95]])


def moved(model: Any, expert_rank: int = EXPERT_RANK) -> Any:
    """A policy whose LoRA does something."""
    actor = add_lora(model, RANK, 2.0, seed=1, expert_rank=expert_rank)
    drawn = {
        n: v + 0.2 * mx.random.normal(v.shape, key=key(2, n))
        for n, v in lora_parameters(actor).items()
    }
    set_parameters(actor, drawn)
    return actor


def quantized(model: Any) -> Any:
    """In 4 bits, with scales in fp32."""
    nn.quantize(
        model, group_size=32, bits=4, class_predicate=lambda _, m: hasattr(m, "to_quantized")
    )
    model.freeze()
    return model


def weighted(logits: mx.array) -> mx.array:
    """Some scalar of them."""
    return (logits * mx.random.normal(logits.shape, key=key(3))).mean()


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("kept", (0, 1))
@pytest.mark.parametrize("family", ("qwen3_moe", "gpt_oss", "deepseek_v3"))
def test_staged_gradients_of_experts_are_those_of_autodiff(
    family: str, kept: int, packed: bool
) -> None:
    if packed:
        skip_without_kernel(family)
    model = tiny_mixture(family)
    actor = moved(quantized(model) if packed else model)
    names = lora_parameters(actor)
    whole = mx.concatenate([mx.broadcast_to(PROMPT, (3, PROMPT.shape[1])), ROWS], axis=1)

    def plain(values: dict[str, mx.array]) -> mx.array:
        set_parameters(actor, values)
        return weighted(actor(whole)[:, PROMPT.shape[1] :])

    def cotangents(states: list[States]) -> list[States]:
        ((h_prompt, h_rows),) = states
        return [(mx.zeros(h_prompt.shape), mx.grad(lambda h: weighted(decoder.head(h)))(h_rows))]

    expected = mx.grad(plain)(names)
    set_parameters(actor, names)
    decoder = Decoder(actor, Sizes(kept_blocks=kept))
    found = gradients(decoder, [Pass(PROMPT, ROWS)], cotangents)
    assert found.keys() == expected.keys()
    experts = [n for n, v in found.items() if v.ndim == 3]
    assert experts and all(mx.any(found[n]).item() for n in experts)
    for name, value in found.items():
        scale = max(1.0, mx.abs(expected[name]).max().item())
        assert mx.abs(value - expected[name]).max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_gets_a_lora_and_no_router_does(family: str) -> None:
    model = tiny_mixture(family)
    found = coverage(model)
    actor = add_lora(model, RANK, 2.0, seed=1, expert_rank=EXPERT_RANK)
    adapted = dict(lora_modules(actor))
    experts = [m for m in adapted.values() if isinstance(m, LoRASwitchLinear)]
    held = [m for _, m in actor.named_modules() if type(m).__name__ == "SwitchLinear"]
    assert experts and len(experts) == len(held)
    assert all(m.lora_a.shape[:2] == (EXPERTS, EXPERT_RANK) for m in experts)
    assert not any("router" in n or n.endswith((".gate", "gate.weight")) for n in adapted)
    assert found.router_layers == sum(
        any(type(m).__name__ == "SwitchLinear" for _, m in b.named_modules()) for b in model.layers
    )
    sizes = sum(m.linear.weight.size for m in adapted.values())
    blocks = sum(v.size for b in model.layers for _, v in tree_flatten(b.parameters()))
    assert found.share(EXPERT_RANK) == sizes / blocks
    assert mx.array_equal(actor(ROWS), model(ROWS)).item()  # B starts at zero


def test_without_a_rank_of_their_own_experts_stay_as_they_are() -> None:
    model = tiny_mixture("qwen3_moe")
    actor = add_lora(model, RANK, 2.0, seed=1)
    assert not any(isinstance(m, LoRASwitchLinear) for _, m in lora_modules(actor))
    every = "on 99% of the blocks' weights, experts at rank 2, 2 routers frozen"
    assert coverage(model).describe(EXPERT_RANK) == every
    assert coverage(model).describe(0).endswith("weights, experts frozen, 2 routers frozen")


@pytest.mark.parametrize("ranks", ((4, 2), (2, 4), (3, 3)))
@pytest.mark.parametrize("family", ("qwen3_moe", "deepseek_v3"))
def test_a_saved_adapter_loads_here_bit_for_bit_and_in_mlx_lm(
    family: str, ranks: tuple[int, int], tmp_path: Path
) -> None:
    skip_without_kernel(family)
    if max(ranks) % 4 and device_name() == "cuda":
        pytest.skip("this backend has no kernel for the rank in mlx-lm's own layers")
    model = quantized(tiny_mixture(family))
    actor = add_lora(model, ranks[0], 2.0, seed=1, blocks=1, expert_rank=ranks[1])
    drawn = {
        n: mx.random.normal(v.shape, key=key(2, n)) / 4 for n, v in lora_parameters(actor).items()
    }
    set_parameters(actor, drawn)
    save_adapter(tmp_path, actor)
    again = lora_parameters(load_adapter(model, tmp_path))
    assert again.keys() == drawn.keys()
    assert all(mx.array_equal(again[n], drawn[n]).item() for n in drawn)
    theirs = share(model)
    load_adapters(theirs, str(tmp_path))
    assert mx.abs(theirs(ROWS) - actor(ROWS)).max().item() < 1e-4
    assert mx.abs(model(ROWS) - actor(ROWS)).max().item() > 0.05


def test_an_adapter_whose_filling_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = tiny_mixture("qwen3_moe")
    save_adapter(tmp_path, moved(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == RANK
    config["lora_parameters"]["expert_rank"] = 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"switch_mlp.*does not fit this model"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("family", ("qwen3_moe", "gpt_oss"))
def test_a_merged_mixture_computes_what_its_lora_does_and_comes_back(family: str) -> None:
    packed = quantized(tiny_mixture(family))
    model = share(packed)
    apply_precision(model, Precision("cpu", dense=True, dtype=mx.float32))
    before = {n: np.asarray(v).tobytes() for n, v in tree_flatten(model.parameters())}
    actor = moved(model)
    wanted = actor(ROWS)
    mx.eval(wanted)
    with merged(actor, packed) as sampled:
        assert not lora_modules(sampled)
        assert mx.abs(sampled(ROWS) - wanted).max().item() < 1e-3
    after = {n: np.asarray(v).tobytes() for n, v in tree_flatten(model.parameters())}
    assert after == before


def test_keys_are_names_within_a_block() -> None:
    assert lora_keys(tiny_mixture("mixtral"), experts=False) == [
        f"self_attn.{n}_proj" for n in "koqv"
    ]


@pytest.mark.parametrize("rank", (1, 3, 8))
def test_a_rank_that_cuda_cannot_gather_is_filled_up_with_zeros(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = moved(tiny_mixture("qwen3_moe"), rank)
    values = lora_parameters(actor)

    def loss(values: Any) -> mx.array:
        set_parameters(actor, values)
        return weighted(actor(ROWS))

    expected = mx.value_and_grad(loss)(values)
    mx.eval(expected)
    monkeypatch.setattr(kernels, "device_name", lambda: "cuda")
    gathered, gather = set(), mx.gather_mm

    def recorded(x: mx.array, factor: mx.array, **rest: Any) -> mx.array:
        gathered.update(n for n in factor.shape[1:] if n not in (WIDTH, INNER))
        return gather(x, factor, **rest)

    monkeypatch.setattr(mx, "gather_mm", recorded)
    value, found = mx.value_and_grad(loss)(values)
    assert gathered == {8}
    assert value.item() == pytest.approx(expected[0].item(), abs=1e-6)
    for name, gradient in found.items():
        assert gradient.shape == values[name].shape
        assert mx.allclose(gradient, expected[1][name], atol=1e-6).item(), name


def test_experts_in_16_bits_get_a_lora_where_gather_mm_takes_fp32_alone() -> None:
    exact = quantized(tiny_mixture("qwen3_moe"))
    half = share(exact)
    apply_precision(half, Precision("cpu", dense=False, dtype=mx.bfloat16))
    wanted, found = (moved(model)(ROWS).astype(mx.float32) for model in (exact, half))
    assert mx.abs(found - wanted).max().item() < 0.1 * mx.abs(wanted).max().item()
    assert (
        dict(lora_modules(moved(half)))[EXPERT](
            mx.ones((3, 1, 1, 64), mx.bfloat16), mx.array([[0, 1], [2, 3], [1, 0]])
        ).dtype
        == mx.bfloat16
    )


def test_a_router_that_knows_more_choices_than_experts_stays_frozen() -> None:
    model, block = nn.Module(), nn.Module()
    block.mlp = nn.Module()
    block.mlp.experts = SwitchLinear(8, 4, 3)
    block.mlp.router = {"classifier": nn.Linear(8, 5), "norm": nn.Linear(8, 8)}
    block.mlp.gate_proj = nn.Linear(8, 4)
    model.layers = [block]
    assert lora_keys(model) == ["mlp.experts", "mlp.gate_proj"]
    assert coverage(model).router_layers == 2
