"""The plan: what fits is chosen, what does not is refused, and prediction meets measurement."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from bench.decoders import decoder_config
from mlx_grpo.config.checks import parse_bytes
from mlx_grpo.config.settings import train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.models.lora import add_lora, lora_parameters
from mlx_grpo.plan.footprint import footprint, footprint_of
from mlx_grpo.plan.memory import Plan, RewardFootprint, choose, predict
from mlx_grpo.plan.planner import planner_for
from mlx_grpo.training.loop import train
from tests.helpers.shapes import GEMMA_2B, PACKED, WORK
from tests.helpers.tiny import write_jsonl


def gemma(reward: RewardFootprint, limit: float, residency: str = "auto") -> Plan:
    return choose(GEMMA_2B, reward, WORK, int(limit), [PACKED], residency)


def test_gemma_2b_fits_into_two_and_a_half_gigabytes_with_either_reward_model() -> None:
    adapter = gemma(RewardFootprint(GEMMA_2B.lora_bytes(8)), 2.5e9)
    own = gemma(RewardFootprint(model=GEMMA_2B), 2.5e9)
    assert adapter.fits and not adapter.choice.swap
    assert own.fits and own.choice.swap


def test_a_reward_model_of_its_own_stays_where_there_is_room() -> None:
    assert not gemma(RewardFootprint(model=GEMMA_2B), 8e9).choice.swap
    assert gemma(RewardFootprint(model=GEMMA_2B), 8e9, "swap").choice.swap
    assert not gemma(RewardFootprint(model=GEMMA_2B), 2.5e9, "resident").fits


def test_with_room_enough_nothing_is_cut() -> None:
    plan = gemma(RewardFootprint(), 64e9)
    tokens = WORK.prompt_tokens + WORK.k * WORK.completion_tokens
    sizes = Sizes(
        head_bytes=256 << 20, kept_blocks=GEMMA_2B.blocks, texts=WORK.k, text_tokens=tokens
    )
    assert plan.choice == replace(PACKED, decode_rows=96, sizes=sizes)


def test_as_many_blocks_are_kept_as_there_is_room_for() -> None:
    plan = gemma(RewardFootprint(), 6e9)
    kept = plan.choice.sizes.kept_blocks
    assert 0 < kept < GEMMA_2B.blocks and plan.fits
    more = replace(plan.choice, sizes=replace(plan.choice.sizes, kept_blocks=kept + 1))
    assert not predict(GEMMA_2B, RewardFootprint(), WORK, more, plan.limit).fits


def test_blocks_without_a_lora_are_never_kept() -> None:
    few = replace(WORK, lora_layers=4)
    plan = choose(GEMMA_2B, RewardFootprint(), few, int(64e9), [PACKED])
    assert plan.choice.sizes.kept_blocks == 4
    assert plan.adapter == 3 * GEMMA_2B.lora_bytes(16) * 4 // 18


def test_an_update_of_fewer_rows_needs_less_memory() -> None:
    all_rows, two = (
        predict(GEMMA_2B, RewardFootprint(), replace(WORK, update_rows=m), PACKED, int(3e9))
        for m in (0, 2)
    )
    assert two.stages["update"] < all_rows.stages["update"]
    assert two.stages["rollout"] == all_rows.stages["rollout"]


@pytest.mark.parametrize("limit", [2.0e9, 2.2e9, 2.4e9, 2.6e9, 3e9, 4e9, 6e9])
def test_a_plan_that_fits_is_within_its_limit_and_more_memory_never_plans_less(
    limit: float,
) -> None:
    smaller, larger = gemma(RewardFootprint(), limit), gemma(RewardFootprint(), 1.5 * limit)
    assert smaller.fits == (smaller.peak <= limit)
    assert larger.choice.decode_rows >= smaller.choice.decode_rows
    assert larger.fits or not smaller.fits


def test_what_is_asked_for_is_kept() -> None:
    given = replace(PACKED, decode_rows=12, sizes=Sizes(rows=2))
    plan = choose(GEMMA_2B, RewardFootprint(), WORK, int(3e9), [given])
    assert (plan.choice.decode_rows, plan.choice.sizes.rows) == (12, 2)


def test_a_footprint_counts_what_a_loaded_model_has(sft: Path) -> None:
    found, model = footprint(sft), load_backbone(sft).model
    adapter = lora_parameters(add_lora(model, rank=4, scale=2.0, seed=0))
    assert found.lora_bytes(4) == sum(v.nbytes for v in adapter.values())
    assert (found.blocks, found.hidden, found.mlp, found.heads) == (2, 32, 64, 4)
    assert found.attention == 32 + 2 * 2 * 8
    assert found.cache_values == 2 * 2 * 2 * 8


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""
    from mlx_grpo.training import setup

    def never(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(setup, "load_backbone", never)


@pytest.mark.parametrize("flag", ["prompts", "eval_prompts"])
def test_a_bad_row_is_found_before_weights_are_loaded(
    flag: str, train_arguments: dict[str, Any], no_weights: None, tmp_path: Path
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "hello"}, {"prompt": 5}])
    config = train_config(**{**train_arguments, flag: str(bad)})
    with pytest.raises(InputError, match=r"bad\.jsonl:2: field 'prompt' must be a text"):
        train(config, Console(quiet=True))
    assert not config.run_directory.exists()


def test_a_model_without_keys_and_values_keeps_states_of_a_fixed_size() -> None:
    from mlx_lm.models import mamba

    arguments = mamba.ModelArgs("mamba", 64, 32, 64, 8, 4, 2, True, False, 2)
    found = footprint_of(mamba.Model(arguments), 1)
    assert found.cache_values == 0 and found.state_values > 0


def test_a_model_that_runs_its_blocks_twice_is_refused() -> None:
    from mlx_lm.models import nanbeige

    config = decoder_config("nanbeige loops")
    model = nanbeige.Model(nanbeige.ModelArgs.from_dict(config))
    with pytest.raises(InputError, match="model type 'nanbeige' is not supported"):
        footprint_of(model, 1)


def test_a_run_that_cannot_fit_is_refused_with_the_table_before_weights_are_loaded(
    train_arguments: dict[str, Any], no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(**{**train_arguments, "memory_limit": "100KB"})
    with pytest.raises(InputError, match="take a smaller model"):
        train(config, Console())
    assert "peak: update" in capsys.readouterr().out
    assert not config.run_directory.exists()


def test_the_way_out_of_a_tight_limit_is_a_shorter_answer(
    train_arguments: dict[str, Any],
) -> None:
    config = train_config(**{**train_arguments, "max_completion_length": 512})
    short = (
        planner_for(with_settings(config, max_completion_length=64, memory_limit="1KB")).plan().peak
    )
    tight = with_settings(config, memory_limit=f"{short // 1000 + 1}KB")
    with pytest.raises(InputError, match="it fits with --max-completion-length 64"):
        train(tight, Console(quiet=True))


def test_a_run_within_a_tight_limit_trains_as_one_without(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = train_config(**{**train_arguments, "num_iterations": 1})
    roomy = planner_for(config).plan()
    tight = with_settings(
        config, memory_limit=f"{roomy.peak * 95 // 100}B", output=str(tmp_path / "b")
    )
    assert planner_for(tight).plan().choice != roomy.choice
    before = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    try:
        assert all(train(c, Console(quiet=True)) for c in (config, tight))
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])
    arrays = [
        mx.load(str(c.run_directory / "final" / "adapters.safetensors")) for c in (config, tight)
    ]
    assert all(mx.allclose(arrays[0][n], v, atol=1e-4).item() for n, v in arrays[1].items())


@pytest.mark.parametrize(
    "text, size",
    [("2.5GB", 2_500_000_000), ("6GiB", 6 << 30), ("100 kb", 100_000), ("7B", 7), ("", 0)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["2.5", "GB", "-1GB", "0GB", "two GB", "1e9B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--memory-limit"):
        parse_bytes(text)


def test_a_footprint_counts_the_layers_with_a_lora_alone(sft: Path) -> None:
    found, model = footprint(sft, ("v_proj",)), load_backbone(sft).model
    adapter = lora_parameters(add_lora(model, rank=4, scale=2.0, seed=0, targets=("v_proj",)))
    assert found.lora_bytes(4) == sum(v.nbytes for v in adapter.values())
