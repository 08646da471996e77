"""The estimate of time: what a stage must move and do, and which limit binds it."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.plan.devices import MACS, THIS, Device, check_name, device
from mlx_grpo.plan.footprint import footprint_of
from mlx_grpo.plan.memory import RewardFootprint, weight_bytes
from mlx_grpo.plan.planner import planner_for
from mlx_grpo.plan.timing import REACHED, StageCost, estimate, stage_costs
from tests.helpers.shapes import GEMMA_2B, PACKED, WORK

ADAPTER = RewardFootprint(adapter_bytes=GEMMA_2B.lora_bytes(8))
CHOICE = replace(PACKED, decode_rows=96)


def test_gemma_2b_has_the_weights_of_its_linear_layers() -> None:
    attention, mlp = 2 * 2048 * 2048 + 2 * 2048 * 256, 3 * 2048 * 16384
    assert GEMMA_2B.block_weights == 18 * (attention + mlp)


def test_block_weights_are_counted_by_layer(backbone: Backbone) -> None:
    dense = footprint_of(backbone.model, 1)
    expected = sum(
        m.weight.shape[0] * m.weight.shape[1]
        for layer in backbone.model.layers
        for n, m in layer.named_modules()
        if n.endswith("_proj")
    )
    assert dense.block_weights == expected > 0


def test_a_rollout_reads_the_weights_once_a_token_of_all_rows() -> None:
    wide = stage_costs(GEMMA_2B, ADAPTER, WORK, CHOICE)["rollout"]
    narrow = stage_costs(GEMMA_2B, ADAPTER, WORK, replace(CHOICE, decode_rows=6))["rollout"]
    weights = WORK.completion_tokens * weight_bytes(GEMMA_2B, CHOICE)
    assert narrow.bytes - wide.bytes == 15 * weights
    assert narrow.flops == wide.flops


@pytest.mark.parametrize(("asked", "planned"), [(0, 36), (4, 6), (10, 6), (12, 12), (99, 96)])
def test_rows_that_decode_together_are_whole_prompts(
    asked: int, planned: int, train_arguments: dict[str, Any]
) -> None:
    own = {"batch_size": 6, "K": 6, "decode_rows": asked, "memory_limit": "64GB"}
    assert (
        planner_for(train_config(**{**train_arguments, **own})).plan().choice.decode_rows == planned
    )


@pytest.mark.parametrize(
    ("own", "form"),
    [
        ({}, (False, 2)),
        ({"precision": "fp32"}, (False, 4)),
        ({"precision": "fp16", "weights": "dense"}, (True, 2)),
    ],
)
def test_another_machine_holds_what_is_asked_for(
    own: dict[str, Any],
    form: tuple[bool, int],
    train_arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("MLX_GRPO_PRECISION", "MLX_GRPO_WEIGHTS"):
        monkeypatch.delenv(variable, raising=False)
    config = train_config(**{**train_arguments, "memory_limit": "64GB", **own})
    choice = planner_for(config, here=False).plan().choice
    assert (choice.dense, choice.value_bytes) == form


def test_fewer_rows_a_pass_run_the_prompt_more_often() -> None:
    whole, cut = (
        stage_costs(GEMMA_2B, ADAPTER, WORK, replace(CHOICE, sizes=Sizes(rows=rows)))
        for rows in (0, 3)
    )
    extra = WORK.prompts * WORK.prompt_tokens
    assert cut["reward"].flops - whole["reward"].flops == 2 * GEMMA_2B.block_weights * extra
    # 3 runs and the old log-probs of three minibatches of four; of all four, and all twice
    assert whole["update"].bytes == 3.75 * WORK.prompts * weight_bytes(GEMMA_2B, CHOICE)
    assert cut["update"].bytes == 2 * 4 * WORK.prompts * weight_bytes(GEMMA_2B, CHOICE)


def flops(stage: str, kept_blocks: int = 0, **work: float) -> float:
    """Of Gemma-2B, without the LoRA's own and the head's."""
    bare = replace(GEMMA_2B, lora_width=0, vocabulary=0)
    choice = replace(CHOICE, sizes=Sizes(kept_blocks=kept_blocks))
    return stage_costs(bare, ADAPTER, replace(WORK, **work), choice)[stage].flops


def test_what_the_settings_save_of_the_update() -> None:
    rows = WORK.prompts * (WORK.prompt_tokens + WORK.k * WORK.completion_tokens)
    once = 2.0 * GEMMA_2B.block_weights * rows
    assert flops("update") == 3.75 * once
    assert flops("update", kept_blocks=18) == 2.75 * once
    assert flops("update", kept_blocks=9) == 3.25 * once
    assert flops("update", lora_layers=9) == 2.75 * once
    assert flops("update", lora_layers=9, kept_blocks=9) == 2.25 * once
    shorter = (WORK.prompt_tokens + 2 * WORK.completion_tokens) / rows * WORK.prompts
    assert flops("update", update_rows=2) == pytest.approx(3.75 * once * shorter)


def test_an_adapter_is_run_again_only_in_blocks_that_are_not_kept() -> None:
    """Forward x A, (x A) B; backward dy B', both gradients, the inputs'; two flops a value each."""
    tokens = WORK.prompts * (WORK.prompt_tokens + WORK.k * WORK.completion_tokens)
    product = 2.0 * GEMMA_2B.lora_values(WORK.lora_rank, WORK.expert_rank) * tokens

    def products(kept_blocks: int, **work: float) -> float:
        found = []
        for width in (GEMMA_2B.lora_width, 0):
            model = replace(GEMMA_2B, lora_width=width, vocabulary=0)
            choice = replace(CHOICE, sizes=Sizes(kept_blocks=kept_blocks))
            costs = stage_costs(model, ADAPTER, replace(WORK, **work), choice)
            found.append(costs["update"].flops)
        return (found[0] - found[1]) / product

    before = 1 - WORK.epochs / WORK.steps  # old log-probs
    assert products(0) == pytest.approx(4 + before)
    assert products(18) == pytest.approx(3 + before)
    assert products(9) == pytest.approx(3.5 + before)
    assert products(0, lora_layers=9) == pytest.approx((4 + before) / 2)


def test_a_share_of_the_kl_spares_its_completions_and_prompts_without_any() -> None:
    saved = flops("logprob") - flops("logprob", kl_share=0.25)
    answered = WORK.prompts * WORK.k * WORK.completion_tokens
    rows = WORK.prompts * WORK.k
    none_drawn = math.comb(rows - WORK.k, rows // 4) / math.comb(rows, rows // 4)
    spared = 0.75 * answered + none_drawn * WORK.prompts * WORK.prompt_tokens
    assert saved == pytest.approx(2.0 * GEMMA_2B.block_weights * spared)
    assert flops("logprob", kl_share=1 / rows) < flops("logprob") / 20


def test_without_a_reward_model_its_stage_costs_nothing() -> None:
    assert stage_costs(GEMMA_2B, RewardFootprint(), WORK, CHOICE)["reward"] == StageCost(0, 0)


def test_the_binding_limit_sets_the_time() -> None:
    slow_memory = Device("a", bandwidth=10.0, arithmetic=1e9)
    slow_units = Device("b", bandwidth=1e9, arithmetic=10.0)
    cost = {"rollout": StageCost(bytes=20.0, flops=40.0)}
    moving, computing = (estimate(cost, d)["rollout"] for d in (slow_memory, slow_units))
    assert (moving.at_least, moving.bound) == (2.0, "bandwidth")
    assert (computing.at_least, computing.bound) == (4.0, "arithmetic")
    assert moving.expected == 2.0 / REACHED["rollout"]
    known = replace(slow_memory, reached=0.5)
    assert estimate(cost, known)["rollout"].expected == 2.0 / 0.5


def test_this_machine_is_measured_and_a_mac_is_looked_up() -> None:
    here = device(THIS, mx.float32)
    assert here.measured and here.bandwidth > 0 and here.arithmetic > 0
    assert replace(device("m2-pro"), reached=None) == MACS["m2-pro"]


def test_a_mac_reaches_what_its_dtype_does() -> None:
    assert device("m2-pro").reached == device("m2-pro", mx.float16).reached == 0.76
    assert device("m1", mx.bfloat16).reached == 0.43
    assert device("m3-max").reached == device("m4", mx.float16).reached == 0.68


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"--device: must be this or one of m1, .*, not 'm9'"):
        check_name("m9")


def test_cheaper_settings_are_named_with_what_they_leave(train_arguments: dict[str, Any]) -> None:
    given = train_arguments | {"K": 4, "batch_size": 4, "minibatch_size": 1}
    given |= {"update_rows": 0, "kl_share": 1.0, "num_iterations": 90}
    savings = planner_for(train_config(**given), here=False).savings(device("m2-pro"))
    (rows, _), (share, _), (layers, _), (together, least) = savings
    assert rows == "--update-rows 2" and share == "--kl-share 0.125"
    assert layers == "--lora-layers 1" and together == f"{rows} {share} {layers}"
    assert 0 < least < min(left for _, left in savings[:-1]) < 1


def test_nothing_is_offered_that_would_do_harm_or_save_nothing(
    train_arguments: dict[str, Any],
) -> None:
    def offered(**values: Any) -> str:
        config = train_config(**{**train_arguments, "update_rows": 0, "kl_share": 1.0, **values})
        found = planner_for(config, here=False).savings(device("m2-pro"))
        return " ".join(flags for flags, _ in found)

    assert "--kl-share" in offered(K=4, batch_size=4, num_iterations=90)
    assert "--kl-share" not in offered(K=4, batch_size=4, num_iterations=89)
    few = {"batch_size": 4, "num_iterations": 90}
    assert "--kl-share" not in offered(K=6, kl_share=0.25, **few)  # six are measured either way
    assert "--update-rows" not in offered(K=2, **few)


def test_what_is_cheap_already_is_not_offered(train_arguments: dict[str, Any]) -> None:
    given = train_arguments | {"update_rows": 1, "kl_control": "reward", "lora_layers": 1}
    assert planner_for(train_config(**given), here=False).savings(device("m2-pro")) == []
