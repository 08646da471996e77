"""What is planned for mixtures of experts and for states of a fixed size, against what is there."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_grpo.config.settings import train_config
from mlx_grpo.models.backward import Pass, States, gradients
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import add_lora, lora_parameters
from mlx_grpo.plan import footprint as plan_footprint
from mlx_grpo.plan.footprint import footprint_of
from mlx_grpo.plan.memory import Choice, RewardFootprint, Workload, predict
from mlx_grpo.plan.planner import planner_for, way_out
from tests.helpers.mixtures import COMMON, EXPERTS, MIXTURES, mixture_config, tiny_mixture
from tests.helpers.tiny import model_of, write_model_of

WORK = Workload(1, 4, 64, 64, lora_rank=4, expert_rank=2)
DENSE = Choice(dense=True, value_bytes=4, decode_rows=4, sizes=Sizes(head_bytes=4 << 20))
QWEN3_NEXT = {
    **COMMON,
    **MIXTURES["qwen2_moe"],
    "model_type": "qwen3_next",
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize("layers", (0, 1))
@pytest.mark.parametrize("family", MIXTURES)
def test_the_planned_lora_is_the_one_that_is_made(family: str, layers: int) -> None:
    model = tiny_mixture(family, first_k_dense_replace=0)
    found = footprint_of(model, 1)
    actor = add_lora(model, 4, 2.0, seed=0, blocks=layers, expert_rank=2)
    made = sum(v.nbytes for v in lora_parameters(actor).values())
    assert found.lora_bytes(4, layers, 2) == made
    assert found.active_experts == 2 / EXPERTS


def test_the_peak_of_an_update_is_about_what_is_planned() -> None:
    """One block of a mixture, wide enough for its arrays to be what counts."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16}
    model = tiny_mixture("qwen3_moe", num_hidden_layers=1, num_experts_per_tok=4, **wide)
    found = footprint_of(model, sum(v.size for v in _arrays(model)))
    decoder = Decoder(add_lora(model, 4, 2.0, seed=0, expert_rank=2))
    mx.eval(decoder.model.parameters())
    prompt, rows = mx.zeros((1, 256), mx.int32), mx.random.randint(0, 256, (8, 256))

    def cotangents(states: list[States]) -> list[States]:
        return [(mx.zeros(p.shape), mx.ones(r.shape)) for p, r in states]

    gc.collect()  # what other tests have left would be freed while this is measured
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(decoder, [Pass(prompt, rows)], cotangents))
    measured = mx.get_peak_memory() - before
    work = replace(WORK, k=8, prompt_tokens=256, completion_tokens=256)
    plan = predict(found, RewardFootprint(), work, DENSE, 1 << 40)
    planned = plan.stages["update"] - plan.weights - plan.adapter
    print(f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert 0.8 < planned / measured < 1.5


def _arrays(model: Any) -> list[mx.array]:
    return [v for _, v in tree_flatten(model.parameters())]


def test_states_of_a_fixed_size_are_counted_once_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_footprint, "check_trainable", lambda _: None)  # of shapes alone
    found = footprint_of(model_of(QWEN3_NEXT), 1)
    assert found.scan_values == 4 * 16 * 32
    windows = 3 * (2 * 2 * 16 + 4 * 32)
    assert found.state_values == 2 * (found.scan_values + windows)
    assert found.cache_values == 2 * 2 * 2 * 16
    longer = replace(WORK, completion_tokens=128)
    less, more = (predict(found, RewardFootprint(), w, DENSE, 1 << 40) for w in (WORK, longer))
    grown = more.stages["update"] - less.stages["update"]
    other = replace(found, scans_in_pieces=False)  # another recurrence keeps them at each token
    less, more = (predict(other, RewardFootprint(), w, DENSE, 1 << 40) for w in (WORK, longer))
    state, tokens = 4 * found.scan_values, 4 * 64
    dearer = more.stages["update"] - less.stages["update"] - grown
    assert found.scans_in_pieces
    assert dearer == pytest.approx((4.2 - 1 / 16) * tokens * state, rel=1e-3)


def test_a_mixture_whose_mlp_has_another_name_is_not_planned_in_chunks() -> None:
    cut = replace(DENSE, sizes=Sizes(mlp_tokens=64))
    for family, cuttable in (("mixtral", False), ("qwen3_moe", True)):
        found = footprint_of(tiny_mixture(family, hidden_size=128), 1)
        whole, chunked = (predict(found, RewardFootprint(), WORK, c, 1) for c in (DENSE, cut))
        assert (chunked.stages["logprob"] < whole.stages["logprob"]) == cuttable
        assert found.cuttable == cuttable


def test_a_mixture_that_does_not_fit_is_told_the_rank_at_which_it_would(tmp_path: Path) -> None:
    config = mixture_config("qwen3_moe", num_experts=64)
    actor = write_model_of(tmp_path / "mixture", config)
    settings = train_config(
        actor_model=str(actor),
        rm_model="none",
        reward=("x.py:f",),
        expert_lora_rank=64,
        max_completion_length=16,
        memory_limit="100MB",
    )
    planner = planner_for(settings)
    assert not planner.plan().fits
    assert way_out(planner).startswith("it fits with --expert-lora-rank ")
