"""Several seeds: weights loaded once, each run the same as alone, nothing found out too late."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.cli.train import Run, train_all
from mlx_grpo.config.settings import TrainConfig, train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.distributed.ranks import ALONE
from mlx_grpo.training import loop as trainer
from mlx_grpo.training import setup
from mlx_grpo.training.loop import train
from tests.helpers.loops import ending
from tests.helpers.tiny import write_jsonl

QUIET = Console(quiet=True)


@pytest.fixture
def configs(train_arguments: dict[str, Any], tmp_path: Path) -> list[TrainConfig]:
    """Two seeds of a short run."""
    base = train_config(**{**train_arguments, "num_iterations": 2})
    return [with_settings(base, seed=s, output=str(tmp_path / f"seed-{s}")) for s in (1, 2)]


def adapter(config: TrainConfig) -> bytes:
    return (config.run_directory / "final" / "adapters.safetensors").read_bytes()


def test_weights_are_loaded_once_and_each_seed_is_the_run_it_is_alone(
    configs: list[TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    real = setup.load_backbone
    monkeypatch.setattr(setup, "load_backbone", lambda *a: (loaded.append(a[0]), real(*a))[1])
    assert train_all([Run(c) for c in configs], QUIET, False, False, ALONE)
    assert len(loaded) == 1
    assert "2 runs: seed-1, seed-2" in (tmp_path / "report.html").read_text()
    for config in configs:
        alone = with_settings(config, output=str(tmp_path / "alone" / str(config.run.seed)))
        train(alone, QUIET)
        assert adapter(alone) == adapter(config)
    assert adapter(configs[0]) != adapter(configs[1])


def test_a_directory_in_the_way_of_the_last_seed_is_found_before_the_first(
    configs: list[TrainConfig],
) -> None:
    configs[1].run_directory.mkdir()
    (configs[1].run_directory / "something").touch()
    with pytest.raises(InputError, match=r"seed-2: not empty"):
        train_all([Run(c) for c in configs], QUIET, False, False, ALONE)
    assert not configs[0].run_directory.exists()


def test_a_bad_row_is_found_before_weights_are_loaded_for_several_seeds(
    configs: list[TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": 5}])
    monkeypatch.setattr(setup, "load_backbone", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=r"bad\.jsonl:1: field 'prompt'"):
        train_all(
            [Run(with_settings(c, prompts=str(bad))) for c in configs], QUIET, False, False, ALONE
        )


def test_a_stop_during_one_seed_leaves_the_rest(
    configs: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_loop", ending(False))
    started: list[int] = []
    real = trainer.first_state
    monkeypatch.setattr(trainer, "first_state", lambda c: (started.append(c.run.seed), real(c))[1])
    assert train_all([Run(c) for c in configs], QUIET, False, False, ALONE) is False
    assert started == [1]
