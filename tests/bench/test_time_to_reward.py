"""The variants of the comparison, and what becomes of results that are there."""

from pathlib import Path

import pytest

from bench.learning import time_to_reward
from bench.learning.common import earlier
from bench.learning.time_to_reward import COMMON, VARIANTS, iterations_to, score_at, timed
from mlx_grpo.config.settings import TrainConfig, flat_values
from mlx_grpo.files.atomic import read_json, write_json


def test_the_defaults_are_those_of_a_run() -> None:
    defaults = flat_values(TrainConfig())
    assert VARIANTS["defaults"] == {n: defaults[n] for n in VARIANTS["defaults"]}
    assert VARIANTS["defaults"].keys() == {
        n
        for n in ("batch_size", "minibatch_size", "update_rows", "kl_share", "lora_layers")
        if {**defaults, **COMMON}[n] != defaults[n]
    }


def test_a_score_is_reached_between_two_points_or_never() -> None:
    points = [{"iteration": i, "score": s} for i, s in ((0, 0.5), (5, 0.9), (10, 0.8))]
    assert iterations_to(points, 0.7) == pytest.approx(2.5)
    assert iterations_to(points, 0.95) is None
    assert iterations_to(points, 0.4) == iterations_to(points, 0.5) == 0


def test_the_curve_is_straight_between_two_points_and_ends_with_the_last() -> None:
    points = [{"iteration": i, "score": s} for i, s in ((0, 0.5), (5, 0.9), (10, 0.8))]
    assert [score_at(points, i) for i in (0, 2.5, 5, 9, 10)] == pytest.approx(
        [0.5, 0.7, 0.9, 0.82, 0.8]
    )
    assert score_at(points, 10.1) is None


def test_results_are_kept_under_the_same_settings_alone(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert earlier(None, {}) == earlier(file, {}) == {}
    write_json(file, {"common": {"kl_targets": (0.05,)}, "runs": [1]})
    assert earlier(file, {"common": {"kl_targets": (0.05,)}})["runs"] == [1]
    assert earlier(file, {"common": {"kl_targets": (0.02,)}}) == {}
    assert earlier(file, {"common": {"kl_targets": (0.05,)}, "iterations": 20}) == {}


def test_seconds_are_those_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    earlier_run = {"everything": {"iteration": 60.0}}
    write_json(file, {"common": COMMON, "runs": [], "seconds": earlier_run})
    monkeypatch.setattr(time_to_reward, "times", lambda *_: {"defaults": {"iteration": 20.0}})
    monkeypatch.setattr(time_to_reward, "their_times", lambda *_: {"iteration": 30.0})
    given = ["--times", "2", "--only", "defaults", "trl", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["time_to_reward", *given])
    assert time_to_reward.main() == 0
    assert {n: s["iteration"] for n, s in read_json(file)["seconds"].items()} == {
        "defaults": 20.0,
        "trl": 30.0,
    }


def test_a_learning_rate_does_not_change_the_seconds() -> None:
    seconds = {"defaults": {"iteration": 20.0}, "trl": {"iteration": 30.0}}
    assert timed("defaults-0.0004", seconds) == timed("defaults", seconds) == 20.0
    assert timed("trl-5e-05", seconds) == 30.0
    assert timed("defaults-no-kl", seconds) is None
