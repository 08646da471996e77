"""The update: early stop, finite guard, gradient clipping, passes of fewer rows."""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.types import Parameters, TrainingGroup
from mlx_grpo.grpo.advantages import group_advantages, is_dead, learned_from
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Aggregation, Clip
from mlx_grpo.grpo.update import UpdateSettings, UpdateStats, update
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from mlx_grpo.models.optimizer import adamw_step, new_optimizer
from tests.helpers.groups import actor_of, group_of

SETTINGS = UpdateSettings(
    clip=Clip(),
    aggregation="sequence",
    temperature=1.0,
    max_tokens=16,
    max_grad_norm=0.5,
    minibatch_size=1,
    epochs=1,
    kl_stop=math.inf,
)


def rewarded(seed: int, scores: tuple[float, ...] = (1.0, -0.7, 0.2)) -> TrainingGroup:
    """A group with these scores."""
    return replace(group_of(seed), advantages_K=group_advantages(mx.array([scores]))[0])


def snapshot(decoder: Decoder) -> dict[str, list]:
    return {n: v.tolist() for n, v in lora_parameters(decoder.model).items()}


def updated_by(
    decoder: Decoder, optimizer: optim.AdamW, groups: list[TrainingGroup], settings: UpdateSettings
) -> UpdateStats:
    return update(decoder, optimizer, groups, settings)


def updated(settings: UpdateSettings, groups: int = 2) -> tuple[Parameters, object]:
    decoder = Decoder(actor_of("llama"))
    whole = [rewarded(seed) for seed in range(groups)]
    stats = updated_by(decoder, new_optimizer(1e-2, 0.0), whole, settings)
    return lora_parameters(decoder.model), stats


def test_one_row_a_pass_gives_the_update_of_whole_groups() -> None:
    whole, stats = updated(SETTINGS)
    rows, row_stats = updated(replace(SETTINGS, rows_per_pass=1))
    assert max(mx.abs(whole[n] - rows[n]).max().item() for n in whole) < 1e-5
    assert stats.tokens == row_stats.tokens == 28  # type: ignore[attr-defined]
    assert stats.loss == pytest.approx(row_stats.loss, abs=1e-6)  # type: ignore[attr-defined]


def test_the_ratio_moves_away_from_one_within_an_iteration_and_the_clip_works() -> None:
    _, first = updated(replace(SETTINGS, minibatch_size=2))
    _, later = updated(replace(SETTINGS, minibatch_size=2, epochs=4))
    assert first.approx_kl == pytest.approx(0, abs=1e-6)  # type: ignore[attr-defined]
    assert first.clipped == 0  # type: ignore[attr-defined]
    assert later.steps == 4 and later.clipped > 0  # type: ignore[attr-defined]


def test_the_rest_of_an_iteration_is_skipped_once_the_kl_passes_its_limit() -> None:
    _, stats = updated(replace(SETTINGS, kl_stop=1e-5, epochs=5))
    assert stats.stopped_early  # type: ignore[attr-defined]
    assert 0 < stats.steps < 10  # type: ignore[attr-defined]


def test_a_group_without_a_preference_costs_no_step_and_weighs_on_the_others() -> None:
    decoder = Decoder(actor_of("llama"))
    live, dead = rewarded(1), rewarded(2, (0.5, 0.5, 0.5))
    before = snapshot(decoder)
    assert updated_by(decoder, new_optimizer(1e-2, 0.0), [dead], SETTINGS).steps == 0
    assert snapshot(decoder) == before
    both = updated_by(
        decoder, new_optimizer(1e-2, 0.0), [live, dead], replace(SETTINGS, minibatch_size=2)
    )
    alone = updated_by(
        Decoder(actor_of("llama")), new_optimizer(1e-2, 0.0), [live], replace(SETTINGS)
    )
    assert both.grad_norm == pytest.approx(alone.grad_norm / 2, rel=1e-4)


@pytest.mark.parametrize("minibatch, epochs", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("prompt", [2, 11])  # a short prompt makes the rows fall into two buckets
def test_the_first_forward_serves_as_old_log_probs_bit_for_bit(
    minibatch: int, epochs: int, level: str, prompt: int
) -> None:
    clip = Clip(level=level)  # type: ignore[arg-type]
    settings = replace(SETTINGS, minibatch_size=minibatch, epochs=epochs, clip=clip)
    scores = ((1.0, -1.0, 0.0), (0.3, 0.1, 2.0), (0.0, 5.0, 1.0))
    whole = [rewarded(seed, s) for seed, s in enumerate(scores, 1)]
    groups = [replace(g, prompt_ids=g.prompt_ids[:prompt]) for g in whole]
    results = []
    for rows in (3, 0):  # with a number of rows per pass nothing is reused
        decoder = Decoder(actor_of("llama"))
        each = replace(settings, rows_per_pass=rows)
        stats = update(decoder, new_optimizer(1e-2, 0.0), groups, each)
        results.append((snapshot(decoder), stats))
    assert results[0] == results[1]
    assert results[0][1].steps == epochs * -(-3 // minibatch)


def test_dead_groups_cost_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_grpo.grpo import update as module

    def never(*args: object) -> None:
        raise AssertionError("a dead group went through a backward pass")

    monkeypatch.setattr(module, "surrogate_gradients", never)
    decoder = Decoder(actor_of("llama"))
    before = snapshot(decoder)
    dead = [rewarded(seed, (1.0, 1.0, 1.0)) for seed in (1, 2)]
    stats = update(decoder, new_optimizer(1e-2, 0.0), dead, SETTINGS)
    assert stats.steps == 0
    assert snapshot(decoder) == before


def test_values_that_are_not_finite_never_reach_the_weights() -> None:
    decoder = Decoder(actor_of("llama"))
    poisoned = replace(group_of(1), advantages_K=mx.array([math.nan, 0.0, 1.0]))
    before, optimizer = snapshot(decoder), new_optimizer(1e-2, 0.0)
    stats = updated_by(decoder, optimizer, [poisoned], SETTINGS)
    assert [(s.stage, s.positions) for s in stats.skips] == [("loss", (0,))]
    assert stats.steps == 0
    assert snapshot(decoder) == before


def test_the_gradient_is_clipped_to_the_global_norm() -> None:
    parameters = {"layers.0.a": mx.zeros((2,)), "layers.0.b": mx.zeros((1,))}
    gradients = {"layers.0.a": mx.array([3.0, 0.0]), "layers.0.b": mx.array([4.0])}
    optimizer = new_optimizer(1.0, 0.0)
    _, norm = adamw_step(optimizer, gradients, parameters, 0.5)
    assert norm == pytest.approx(5.0)
    moments = optimizer.state["layers"][0]
    # Adam's first moment after one step is (1 - beta1) times the clipped gradient
    assert moments["a"]["m"].tolist() == pytest.approx([0.1 * 0.3, 0.0], rel=1e-4)
    assert moments["b"]["m"].tolist() == pytest.approx([0.1 * 0.4], rel=1e-4)


def test_packed_weights_in_bf16_learn_like_dense_ones() -> None:
    import mlx.nn as nn

    from tests.helpers.tiny import tiny_model

    def stages_with(policy: Precision) -> Decoder:
        model = tiny_model("llama")
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=32, bits=4)
        apply_precision(model, policy)
        model.freeze()
        actor = add_lora(model, rank=4, scale=2.0, seed=1)
        moved = {n: v + 0.05 for n, v in lora_parameters(actor).items()}
        set_parameters(actor, moved)
        return Decoder(actor)

    packed = stages_with(Precision("cpu", dense=False, dtype=mx.bfloat16))
    dense = stages_with(Precision("cpu", dense=True, dtype=mx.float32))
    quantized = packed.model.layers[0].mlp.up_proj.linear
    assert quantized.scales.dtype == mx.bfloat16 and quantized.weight.dtype == mx.uint32
    group = rewarded(1)
    inputs = (mx.array([group.prompt_ids]), group.tokens_KT, group.mask_KT)
    logps, expected = (token_logps(decoder, *inputs) for decoder in (packed, dense))
    assert logps.dtype == mx.float32
    assert mx.abs(logps - expected).max().item() < 0.1
    stats = [
        updated_by(decoder, new_optimizer(1e-3, 0.0), [group], SETTINGS)
        for decoder in (packed, dense)
    ]
    assert stats[0].steps == 1
    assert stats[0].grad_norm == pytest.approx(stats[1].grad_norm, rel=0.1)


@pytest.mark.parametrize(
    ("aggregation", "heavier"), [("sequence", 1), ("token", 14 / 10), ("constant", 1)]
)
def test_completions_left_out_count_in_a_mean_over_completions_and_not_over_tokens(
    aggregation: Aggregation, heavier: float
) -> None:
    settings = replace(SETTINGS, aggregation=aggregation)
    zeroed = replace(group_of(1), advantages_K=mx.array([1.0, 0.0, 0.2]))
    alone = learned_from(group_of(1), [0, 2])
    assert alone.tokens_KT.shape[0] == 2 and alone.left_out == 1
    expected, found = (
        updated_by(Decoder(actor_of("llama")), new_optimizer(1e-2, 0.0), [group], settings)
        for group in (zeroed, alone)
    )
    assert found.loss == pytest.approx(heavier * expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(heavier * expected.grad_norm, rel=1e-5)
    assert found.tokens == expected.tokens - 4  # and they are not computed


def test_a_group_of_which_nothing_is_learned_costs_no_step_and_weighs_as_before() -> None:
    decoder, gone = Decoder(actor_of("llama")), learned_from(group_of(1), [])
    assert is_dead(gone) and gone.left_out == 3
    stats = updated_by(decoder, new_optimizer(1e-2, 0.0), [gone], SETTINGS)
    assert stats.steps == 0
    pair = replace(SETTINGS, minibatch_size=2)
    both, beside_a_dead_one = (
        updated_by(Decoder(actor_of("llama")), new_optimizer(1e-2, 0.0), groups, pair)
        for groups in ([rewarded(2), gone], [rewarded(2), rewarded(1, (1.0, 1.0, 1.0))])
    )
    assert both.loss == pytest.approx(beside_a_dead_one.loss, rel=1e-6)
