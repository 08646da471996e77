"""The experiment's arithmetic, and that what is done is not done again."""

from pathlib import Path
from typing import Any

import pytest

from bench.learning import common, experiment
from bench.learning.experiment import Scores, keep, phases, seed_run
from mlx_grpo.config.settings import flat_values, train_config
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import read_json, write_json

MODEL = Path("weights/sft-4bit")


def test_scores_give_win_rate_and_effect_size() -> None:
    scores = Scores.of([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 3.0])
    assert (scores.before, scores.after) == (1.5, 2.25)
    assert scores.win_rate == 3.5 / 4  # the tie counts half
    assert scores.ties == 1 / 4
    assert scores.cohens_d == pytest.approx(0.75 / ((5 / 3 + 11 / 12) / 2) ** 0.5)


def test_a_phase_is_judged_by_its_second_half() -> None:
    kls = [9.0, 0.1, 0.3, 8.0, 0.5, 0.7]
    rows = [{"kl": kl, "kl/target": 0.2 if i < 3 else 0.1} for i, kl in enumerate(kls)]
    assert phases([{"step": 0, "eval_kl": 7.0}, *rows]) == [
        {"target": 0.2, "kl": pytest.approx(0.2)},
        {"target": 0.1, "kl": pytest.approx(0.6)},
    ]


def test_a_finished_run_is_read_and_not_run_again(
    train_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = train_config(**train_arguments)
    monkeypatch.setattr(experiment, "build_config", lambda _: tiny)
    monkeypatch.setattr(experiment, "SIMILARITY", f"{__name__}:words")
    monkeypatch.setattr(experiment, "JUDGES", ("reward", "gold", "words"))
    first = seed_run("decay", 3, tmp_path, Console(quiet=True))
    assert first["seed"] == 3 and first["before"]["kl"] == 0.0
    assert len(first["iterations"]) == -(-tiny.run.num_iterations // experiment.WINDOW)
    assert set(first["greedy"]) == {"reward", "gold", "words"}
    assert (first["adapter"] == "final") == ("final" not in first)
    monkeypatch.setattr(common, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(experiment, "compare_run", lambda *_, **__: pytest.fail("measured again"))
    assert seed_run("decay", 3, tmp_path, Console(quiet=True)) == first
    with pytest.raises(InputError, match="has another learning_rate; remove it"):
        seed_run("decay", 3, tmp_path, Console(quiet=True), learning_rate=1e-3)


def words(completions: list[str]) -> list[float]:
    return [float(len(c.split())) for c in completions]


def test_figures_of_other_seeds_stay_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    for variant, seed, reward in (("decay", 42, 1), ("decay", 7, 2), ("decay", 42, 3)):
        keep(file, {"variant": variant, "seed": seed, "reward": reward}, MODEL)
    assert [(r["seed"], r["reward"]) for r in read_json(file)["runs"]] == [(42, 3), (7, 2)]
    write_json(file, {**read_json(file), "settings": "others"})
    keep(file, {"variant": "decay", "seed": 1}, MODEL)
    assert [r["seed"] for r in read_json(file)["runs"]] == [1]
    found = keep(file, {"variant": "decay", "seed": 2}, Path("another"))
    assert [r["seed"] for r in read_json(file)["runs"]] == [2]
    assert found == read_json(file)["runs"]


def test_the_reference_protocol_is_what_is_run() -> None:
    settings = flat_values(build_config(experiment.SETTINGS))
    protocol = {"K": 6, "num_iterations": 800, "clip_range": 0.2, "kl_schedule": "phased"}
    assert {name: settings[name] for name in protocol} == protocol
