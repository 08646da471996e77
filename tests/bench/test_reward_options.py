"""The benchmark of reward model options trains each variant once and says what it changed."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from bench.learning import reward_options
from bench.learning.reward_options import Variant, by_prompt, centred, smoothed, trained
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.data.pairs import Split
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.reward_modeling.quality import JudgedPair
from mlx_grpo.reward_modeling.train import Step, bradley_terry_loss
from tests.helpers.tiny import write_jsonl

ROWS = [{"prompt": f"say {i}", "chosen": f"yes {i % 3}", "rejected": "no"} for i in range(12)]


def test_smoothing_is_the_expected_loss_under_one_wrong_label_in_ten() -> None:
    scores_K = mx.array([1.5, -0.5])
    right, wrong = (bradley_terry_loss(scores_K, [p]).item() for p in ((0, 1), (1, 0)))
    assert smoothed(scores_K, [(0, 1)]).item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_centring_costs_nothing_around_zero_and_grows_with_a_common_shift() -> None:
    pairs = [(0, 1)]
    around, shifted = mx.array([1.0, -1.0]), mx.array([4.0, 2.0])
    loss = bradley_terry_loss(around, pairs).item()
    assert centred(around, pairs).item() == pytest.approx(loss)
    assert centred(shifted, pairs).item() == pytest.approx(loss + 0.01 * 6.0**2)


def test_losses_are_means_over_a_prompt_s_pairs() -> None:
    judged = [JudgedPair(0.0, 1, 1, 0), JudgedPair(50.0, 1, 1, 0), JudgedPair(50.0, 1, 1, 1)]
    assert by_prompt(judged) == pytest.approx([0.693147 / 2, 0.0], abs=1e-5)


def test_each_variant_is_trained_once_and_measured_with_its_mean(
    sft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = RewardTrainConfig(
        model=str(sft),
        pairs=str(write_jsonl(tmp_path / "pairs.jsonl", ROWS)),
        lora_rank=2,
        epochs=2,
        valid_fraction=0.0,
        test_fraction=0.25,
    )
    monkeypatch.setattr(
        reward_options, "settings", lambda model: replace(config, model=model, output="")
    )
    file = tmp_path / "options.json"

    def run(*more: str) -> dict[str, dict[str, dict[str, float]]]:
        given = ["reward_options", "--model", str(sft), "--json", str(file), *more]
        monkeypatch.setattr("sys.argv", given)
        assert reward_options.main() == 0
        return dict(json.loads(file.read_text())["variants"])

    first = run("--only", "smoothing")
    assert list(first) == ["shipped", "smoothing"]
    assert first["shipped"]["last"]["pairs"] == 3
    assert first["shipped"]["last"]["loss"] != first["smoothing"]["last"]["loss"]
    assert first["shipped"]["last"]["loss"] != first["shipped"]["mean"]["loss"]
    capsys.readouterr()
    assert run("--only", "shipped") == first
    shown = capsys.readouterr().out
    assert "step" not in shown
    assert "smoothing, mean" in shown


def test_the_mean_is_of_the_last_quarter_of_the_steps(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Step(n, 8, {"w": mx.array([float(n)])}, 1.0, 1) for n in range(1, 9)]
    monkeypatch.setattr(reward_options, "optimizer_steps", lambda *_: iter(steps))
    monkeypatch.setattr(reward_options, "with_weights", lambda _, weights: weights)
    monkeypatch.setattr(reward_options, "figures", lambda weights, *_: weights["w"].item())
    config = RewardTrainConfig()
    found = trained(Variant(), config, backbone, Split([], [], []), Console(quiet=True))
    assert found == {"last": 8.0, "mean": 7.5}
