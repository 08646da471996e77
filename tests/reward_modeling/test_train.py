"""Preference pairs become a reward model: its gradients, its training, what is written."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.convert.convert import convert_rm
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.data.chat import end_of_turn
from mlx_grpo.data.pairs import PairGroup
from mlx_grpo.data.tables import read_rows
from mlx_grpo.files.atomic import read_json
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.directory import fingerprint
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from mlx_grpo.models.reward_model import RewardModel, load_reward_model
from mlx_grpo.reward_modeling.quality import judged_pairs, quality
from mlx_grpo.reward_modeling.train import (
    HEAD,
    bradley_terry_loss,
    group_gradients,
    load_split,
    train_rm,
)
from tests.helpers.tiny import write_jsonl


@pytest.mark.parametrize("difference", [0.0, 2.5, -2.5, 80.0, -200.0])
def test_the_loss_of_a_pair_is_minus_log_sigmoid_even_far_out(difference: float) -> None:
    loss = bradley_terry_loss(mx.array([1.0, 1.0 + difference]), [(1, 0)]).item()
    expected = math.log1p(math.exp(-abs(difference))) + max(-difference, 0.0)
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_staged_gradients_agree_with_finite_differences(backbone: Backbone) -> None:
    decoder = Decoder(add_lora(backbone.model, rank=2, scale=2.0, seed=1))
    head_1D = 0.3 * mx.random.normal((1, decoder.hidden_size), key=key(1, "head"))
    group = PairGroup((5, 6, 7), ((10, 11, 12), (13,), (14, 15)), ((0, 1), (2, 1)))
    gradients, loss = group_gradients(decoder, head_1D, group, weight=0.5)
    scores = RewardModel(decoder, head_1D, None, None).score_ids(group.prompt_ids, [*group.answers])
    direct = bradley_terry_loss(mx.array(scores), group.pairs).item()
    assert loss == pytest.approx(direct, rel=1e-5)

    adapter = lora_parameters(decoder.model)
    assert gradients.keys() == {*adapter, HEAD}

    def loss_at(step: float) -> float:
        set_parameters(decoder.model, {n: v + step * gradients[n] for n, v in adapter.items()})
        moved = RewardModel(decoder, head_1D + step * gradients[HEAD], None, None)
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
        valid_fraction=0.125,
        test_fraction=0.25,
        eval_every=2,
    )


def test_training_separates_an_easy_set(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    found = train_rm(toy, backbone=backbone)
    assert found.pairs == 6
    assert found.accuracy == 1.0
    assert found.loss < 0.5 * math.log(2)

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


def test_the_figures_are_of_the_model_that_was_saved(
    toy: RewardTrainConfig, backbone: Backbone
) -> None:
    told = train_rm(toy, backbone=backbone)
    test = load_split(toy, backbone.tokenizer, lambda _: None).test
    saved = load_reward_model(Path(toy.output), backbone)
    assert quality(judged_pairs(saved, test, end_of_turn(backbone.tokenizer))) == told


def test_the_labels_decide_and_not_the_texts(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(toy.pairs).read_text().splitlines()]
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    pairs = write_jsonl(tmp_path / "turned.jsonl", turned)
    assert train_rm(replace(toy, pairs=str(pairs)), backbone=backbone).accuracy == 1.0


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


def test_pairs_that_leave_nothing_to_train_on_are_refused(
    toy: RewardTrainConfig, backbone: Backbone
) -> None:
    lines = Path(toy.pairs).read_text().splitlines(keepends=True)
    Path(toy.pairs).write_text("".join(lines[:2]))
    with pytest.raises(InputError, match="leave none to train on"):
        train_rm(toy, backbone=backbone)
    assert not Path(toy.output).exists()


def curve_of(config: RewardTrainConfig) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(Path(config.output) / "learning_curve.jsonl")]


def test_the_curve_has_a_line_per_evaluation(toy: RewardTrainConfig, backbone: Backbone) -> None:
    train_rm(toy, backbone=backbone)
    curve = curve_of(toy)
    # 15 prompts in steps of 4, three epochs end to end: 12 steps, the last of a single prompt
    assert [row["step"] for row in curve] == [2, 4, 6, 8, 10, 12]
    assert [row["pairs"] for row in curve] == [8, 16, 24, 32, 40, 45]
    assert curve[-1]["train_loss"] < curve[0]["train_loss"]
    assert curve[-1]["valid_loss"] < curve[0]["valid_loss"]
    assert curve[-1]["valid_accuracy"] == 1.0


def labels_of_no_use(toy: RewardTrainConfig, place: Path) -> RewardTrainConfig:
    """Training pairs that teach the contrary of those that choose the weights."""
    rows = [
        {"prompt": f"say {i}", "chosen": "yes", "rejected": "no", "split": side}
        if side == "train"
        else {"prompt": f"say {i}", "chosen": "no", "rejected": "yes", "split": side}
        for i, side in enumerate(["train"] * 24 + ["valid"] * 3 + ["test"] * 3)
    ]
    return replace(toy, pairs=str(write_jsonl(place / "contrary.jsonl", rows)), epochs=9)


def test_training_stops_when_held_out_pairs_gain_nothing_and_keeps_the_best(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    config = replace(labels_of_no_use(toy, tmp_path), patience=2)
    said: list[str] = []
    stopped = train_rm(config, said.append, backbone)
    curve = curve_of(config)
    lowest = min(curve, key=lambda row: row["valid_loss"])
    assert curve[-1]["step"] - lowest["step"] == 2 * config.eval_every
    assert curve[-1]["step"] < 54  # of nine epochs
    assert said[-1].startswith("no lower held-out loss for 2 evaluations")
    # the pairs measured are like those that choose, so their loss tells which weights were kept
    kept, last = lowest["valid_loss"], curve[-1]["valid_loss"]
    # (the head of the best with the last LoRA is off by a third of the way)
    assert abs(stopped.loss - kept) < 0.1 * abs(last - kept)


def test_without_pairs_that_choose_the_last_weights_are_kept(
    toy: RewardTrainConfig, backbone: Backbone
) -> None:
    said: list[str] = []
    train_rm(replace(toy, valid_fraction=0.0), said.append, backbone)
    curve = curve_of(toy)
    assert [row["valid_loss"] for row in curve] == [None] * len(curve)
    assert "valid: 0 pairs of 0 prompts" in said[0]


def test_converting_keeps_figures_temperature_and_curve(
    toy: RewardTrainConfig, backbone: Backbone, tmp_path: Path
) -> None:
    found = train_rm(toy, backbone=backbone)
    source, sft = locate(toy.output), Path(toy.model)
    convert_rm(source, tmp_path / "converted", sft, Quantization(), None)
    about = read_json(tmp_path / "converted" / "reward_model.json")
    assert about["held_out"]["accuracy"] == found.accuracy
    assert about["temperature"] == found.temperature
    curve = (tmp_path / "converted" / "learning_curve.jsonl").read_text()
    assert curve == (Path(toy.output) / "learning_curve.jsonl").read_text()


def test_an_output_in_use_is_refused(toy: RewardTrainConfig, backbone: Backbone) -> None:
    Path(toy.output).mkdir()
    with pytest.raises(InputError, match="already exists"):
        train_rm(toy, backbone=backbone)
