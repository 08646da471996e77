"""The experiment's arithmetic, and that what is done is not done again."""

from pathlib import Path
from typing import Any

import pytest

from bench.learning import common, experiment
from bench.learning.experiment import Scores, Variant, phases, seed_run
from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console


def test_scores_give_win_rate_and_effect_size() -> None:
    scores = Scores.of([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 3.0])
    assert (scores.before, scores.after) == (1.5, 2.25)
    assert scores.win_rate == 3.5 / 4  # the tie counts half
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
    variant = Variant("tiny", {"kl_targets": (0.5,), "kl_schedule": "constant"})
    first = seed_run(variant, 3, tmp_path, Console(quiet=True))
    assert first["seed"] == 3 and first["before"]["kl"] == 0.0
    assert len(first["iterations"]) == tiny.run.num_iterations
    monkeypatch.setattr(common, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(experiment, "compare_run", lambda *_: pytest.fail("measured again"))
    assert seed_run(variant, 3, tmp_path, Console(quiet=True)) == first
