"""Preference pairs become a reward model: gathered by prompt, split by prompt, learnt, measured."""

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import write_jsonl

from mlx_grpo.config import RewardTrainConfig
from mlx_grpo.errors import InputError
from mlx_grpo.models.backbone import Backbone, fingerprint
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from mlx_grpo.models.reward_model import RewardModel, load_reward_model
from mlx_grpo.models.stages import Stages
from mlx_grpo.rng import key
from mlx_grpo.train_rm import (
    HEAD,
    PairGroup,
    bradley_terry_loss,
    calibration_error,
    group_gradients,
    group_pairs,
    measure,
    split,
    train_rm,
)
from mlx_grpo.types import PreferencePair


def pair(prompt: int, chosen: int, rejected: int) -> PreferencePair:
    return PreferencePair("x", (prompt,), (chosen, 9), (rejected, 9))


def test_pairs_gather_by_prompt_and_share_their_answers() -> None:
    groups = group_pairs([pair(1, 10, 11), pair(2, 10, 12), pair(1, 12, 10), pair(1, 12, 11)])
    assert groups == [
        PairGroup((1,), ((10, 9), (11, 9), (12, 9)), ((0, 1), (2, 0), (2, 1))),
        PairGroup((2,), ((10, 9), (12, 9)), ((0, 1),)),
    ]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(20, 0.1, 2), (20, 0.5, 10), (5, 0.01, 1), (2, 0.1, 1)]
)
def test_a_split_keeps_all_pairs_of_a_prompt_on_one_side(
    count: int, fraction: float, held_out: int
) -> None:
    groups = group_pairs([pair(p, 10 + i, 20) for i in range(3) for p in range(count)])
    train, valid = split(groups, fraction, seed=1)
    assert len(valid) == held_out
    assert all(len(g.pairs) == 3 for g in (*train, *valid))
    assert sorted(g.prompt_ids for g in (*train, *valid)) == [(p,) for p in range(count)]


def test_a_split_depends_on_the_seed_alone() -> None:
    groups = group_pairs([pair(p, 10, 20) for p in range(20)])
    assert split(groups, 0.3, seed=1) == split(groups, 0.3, seed=1)
    assert split(groups, 0.3, seed=1)[1] != split(groups, 0.3, seed=2)[1]


@pytest.mark.parametrize(
    ("probabilities", "error"),
    [
        ([1.0, 1.0], 0.0),  # sure and right
        ([0.0, 0.0], 1.0),  # sure and wrong
        ([0.5] * 4, 0.0),  # undecided, and right half of the time
        ([0.9] * 9 + [0.1], 0.0),  # 90 % sure, right nine times of ten
        ([0.9] * 5 + [0.1] * 5, 0.4),  # 90 % sure, right half of the time
        ([0.72, 0.28], 0.22),
        ([1.0, 1.0, 0.52, 0.48], 0.01),  # (2 * 0 + 2 * 0.02) / 4
        ([0.61, 0.98], 0.205),  # (0.39 + 0.02) / 2: two bins do not cancel
        ([0.6, 0.99, 0.01], (0.4 + 2 * 0.49) / 3),
    ],
)
def test_calibration_error_of_cases_done_by_hand(probabilities: list[float], error: float) -> None:
    assert calibration_error(probabilities) == pytest.approx(error)


@pytest.mark.parametrize("difference", [0.0, 2.5, -2.5, 80.0, -200.0])
def test_the_loss_of_a_pair_is_minus_log_sigmoid_even_far_out(difference: float) -> None:
    loss = bradley_terry_loss(mx.array([1.0, 1.0 + difference]), [(1, 0)]).item()
    expected = math.log1p(math.exp(-abs(difference))) + max(-difference, 0.0)
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-30)


class Scores:
    """Stands in for a reward model: the score of an answer is its first token."""

    def score_ids(self, prompt_ids: tuple[int, ...], rows: list[tuple[int, ...]]) -> list[float]:
        return [float(r[0]) for r in rows]


def test_quality_of_a_case_done_by_hand() -> None:
    groups = [
        PairGroup((1,), ((3, 0, 0), (1, 0)), ((0, 1),)),  # right by 2, the longer one chosen
        PairGroup((2,), ((1,), (2, 0), (2, 1)), ((0, 1), (1, 2))),  # wrong by 1; undecided
    ]
    quality = measure(Scores(), groups)  # type: ignore[arg-type]
    assert (quality.pairs, quality.accuracy) == (3, 0.5)
    assert quality.shorter_wins == 0.5
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), math.log(2)]
    assert quality.loss == pytest.approx(sum(losses) / 3)
    sure, unsure = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert quality.calibration_error == pytest.approx((1 - sure + unsure) / 3)


def test_scores_far_apart_do_not_overflow() -> None:
    group = PairGroup((1,), ((0,), (5000,)), ((0, 1), (1, 0)))
    quality = measure(Scores(), [group])  # type: ignore[arg-type]
    assert quality.loss == 2500.0
    assert quality.calibration_error == pytest.approx(0.5)


def test_staged_gradients_agree_with_finite_differences(backbone: Backbone) -> None:
    stages = Stages(add_lora(backbone.model, rank=2, scale=2.0, seed=1))
    head_1D = 0.3 * mx.random.normal((1, stages.hidden_size), key=key(1, "head"))
    group = PairGroup((5, 6, 7), ((10, 11, 12), (13,), (14, 15)), ((0, 1), (2, 1)))
    gradients, loss = group_gradients(stages, head_1D, group, weight=0.5)
    scores = RewardModel(stages, head_1D, None, None).score_ids(group.prompt_ids, [*group.answers])
    direct = bradley_terry_loss(mx.array(scores), group.pairs).item()
    assert loss == pytest.approx(direct, rel=1e-5)

    adapter = lora_parameters(stages.model)
    assert gradients.keys() == {*adapter, HEAD}

    def loss_at(step: float) -> float:
        set_parameters(stages.model, {n: v + step * gradients[n] for n, v in adapter.items()})
        moved = RewardModel(stages, head_1D + step * gradients[HEAD], None, None)
        found = moved.score_ids(group.prompt_ids, [*group.answers])
        return 0.5 * bradley_terry_loss(mx.array(found), group.pairs).item()

    squared_norm = sum((g**2).sum().item() for g in gradients.values())
    h = 1e-2 / squared_norm**0.5
    slope = (loss_at(h) - loss_at(-h)) / (2 * h)
    assert slope == pytest.approx(squared_norm, rel=1e-2)


@pytest.fixture
def toy(sft: Path, tmp_path: Path) -> RewardTrainConfig:
    """Answers that say yes are better than answers that say no."""
    rows = [
        {"prompt": f"say {i}", "chosen": f"yes {i % 3}", "rejected": f"no {i % 4}"}
        for i in range(24)
    ]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    return RewardTrainConfig(
        model=str(sft),
        pairs=str(pairs),
        output=str(tmp_path / "rm"),
        lora_rank=2,
        learning_rate=1e-2,
        epochs=3,
        valid_fraction=0.25,
    )


def test_training_separates_an_easy_set(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    quality = train_rm(toy, backbone=backbone)
    assert quality.pairs == 6
    assert quality.accuracy == 1.0
    assert quality.loss < 0.5 * math.log(2)

    model = load_reward_model(Path(toy.output), backbone)
    fresh_ids = tuple(backbone.tokenizer.encode("say 99", add_special_tokens=False))
    rows = [
        tuple(backbone.tokenizer.encode(t, add_special_tokens=False)) for t in ("yes 1", "no 1")
    ]
    yes, no = model.score_ids(fresh_ids, rows)
    assert yes > no
    about = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    assert about["held_out"]["accuracy"] == 1.0
    assert about["backbone_fingerprint"] == fingerprint(backbone.path)


def test_the_labels_decide_and_not_the_texts(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(toy.pairs).read_text().splitlines()]
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    pairs = write_jsonl(tmp_path / "turned.jsonl", turned)
    quality = train_rm(replace(toy, pairs=str(pairs)), backbone=backbone)
    assert quality.accuracy == 1.0


def test_training_is_the_same_every_time(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    outputs = [tmp_path / name for name in "ab"]
    for output in outputs:
        train_rm(replace(toy, output=str(output), epochs=1), backbone=backbone)
    for name in ("adapters.safetensors", "reward_head.safetensors"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


def test_a_failed_training_leaves_no_directory(toy: RewardTrainConfig, backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no usable pairs"):
        train_rm(replace(toy, max_length=5), backbone=backbone)
    assert not Path(toy.output).exists()
    assert [p.name for p in Path(toy.output).parent.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (2, 0.9)])
def test_pairs_that_leave_nothing_to_train_on_are_refused(
    toy: RewardTrainConfig, backbone: Backbone, count: int, fraction: float
) -> None:
    lines = Path(toy.pairs).read_text().splitlines(keepends=True)
    Path(toy.pairs).write_text("".join(lines[:count]))
    with pytest.raises(InputError):
        train_rm(replace(toy, valid_fraction=fraction), backbone=backbone)
    assert not Path(toy.output).exists()


def test_an_output_in_use_is_refused(toy: RewardTrainConfig, backbone: Backbone) -> None:
    Path(toy.output).mkdir()
    with pytest.raises(InputError, match="already exists"):
        train_rm(toy, backbone=backbone)
