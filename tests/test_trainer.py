"""A whole run: the same numbers each time, resumable, and nothing left behind by a dry run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.config import TrainConfig
from mlx_grpo.console import Console
from mlx_grpo.errors import InputError
from mlx_grpo.trainer import train

QUIET = Console(quiet=True)


def run_of(config: TrainConfig, resume: bool = False) -> Path:
    """Train to the end and return the run directory."""
    assert train(config, QUIET, resume=resume)
    return config.run_directory


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in lines
    ]


def test_the_same_seed_gives_the_same_run_bit_for_bit(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    runs = [run_of(TrainConfig(**{**train_arguments, "output": str(tmp_path / n)})) for n in "ab"]
    assert rows(runs[0]) == rows(runs[1])
    assert len(rows(runs[0])) == 4 + 3  # iterations, and evaluations at 0, 2 and 4
    adapters = [(run / "final" / "adapters.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]


def test_another_seed_gives_another_run(train_arguments: dict[str, Any], tmp_path: Path) -> None:
    runs = [
        run_of(TrainConfig(**{**train_arguments, "seed": s, "output": str(tmp_path / str(s))}))
        for s in (1, 2)
    ]
    assert rows(runs[0])[1]["reward"] != rows(runs[1])[1]["reward"]


def test_a_resumed_run_equals_the_uninterrupted_one(
    train_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(TrainConfig(**{**train_arguments, "output": str(tmp_path / "whole")}))

    from mlx_grpo import trainer

    real, calls = trainer.iterate, []

    def dies_in_iteration_four(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(trainer, "iterate", dies_in_iteration_four)
    config = TrainConfig(**{**train_arguments, "output": str(tmp_path / "broken")})
    with pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    monkeypatch.setattr(trainer, "iterate", real)
    assert rows(config.run_directory)[-1]["step"] == 3  # beyond the checkpoint at 2
    resumed = run_of(config, resume=True)

    assert rows(resumed) == rows(whole)
    for name in ("final/adapters.safetensors", "completions.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_that_died_before_its_first_checkpoint_starts_again(
    train_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(TrainConfig(**{**train_arguments, "output": str(tmp_path / "whole")}))
    from mlx_grpo import trainer

    def dies(*args: Any) -> Any:
        raise KeyboardInterrupt

    config = TrainConfig(**{**train_arguments, "output": str(tmp_path / "broken")})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "iterate", dies)
        train(config, QUIET)
    assert len(rows(config.run_directory)) == 1  # the evaluation before the first iteration
    assert rows(run_of(config, resume=True)) == rows(whole)


def test_a_signal_stops_after_the_iteration_with_a_checkpoint(
    train_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(TrainConfig(**{**train_arguments, "output": str(tmp_path / "whole")}))
    from mlx_grpo import trainer

    real = trainer.iterate

    def is_told_to_stop(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    config = TrainConfig(**{**train_arguments, "output": str(tmp_path / "stopped")})
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "iterate", is_told_to_stop)
        assert train(config, QUIET) is False
    assert [p.name for p in (config.run_directory / "checkpoints").glob("step-*")] == [
        "step-000001"
    ]
    assert not (config.run_directory / "final").exists()
    assert rows(run_of(config, resume=True)) == rows(whole)


def test_resume_with_changed_prompts_is_refused(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(Path(train_arguments["prompts"]).read_bytes())
    config = TrainConfig(**{**train_arguments, "prompts": str(prompts)})
    run_of(config)
    prompts.write_text(prompts.read_text() + '{"prompt": "more"}\n')
    with pytest.raises(InputError, match="changed since the run started"):
        train(config, QUIET, resume=True)


def test_resume_with_other_mathematics_is_refused(train_arguments: dict[str, Any]) -> None:
    train(TrainConfig(**train_arguments), QUIET)
    with pytest.raises(InputError, match="flags differ"):
        train(TrainConfig(**{**train_arguments, "clip_range": 0.1}), QUIET, resume=True)


def test_a_dry_run_keeps_nothing(train_arguments: dict[str, Any], tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    train(TrainConfig(**train_arguments), QUIET, dry_run=True)
    assert set(tmp_path.rglob("*")) == before


def test_a_run_directory_in_use_is_refused(train_arguments: dict[str, Any]) -> None:
    config = TrainConfig(**train_arguments)
    config.run_directory.mkdir()
    (config.run_directory / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--resume or choose another --output"):
        train(config, QUIET)
    assert [p.name for p in config.run_directory.iterdir()] == ["notes.txt"]


def test_nothing_is_crowned_best_when_nothing_passes_the_gate(
    train_arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(TrainConfig(**{**train_arguments, "kl_targets": (1e-9,)}))
    assert not (run / "best").exists()
    assert (run / "final" / "adapters.safetensors").is_file()
    assert "no evaluation passed the KL gate" in capsys.readouterr().err


def test_an_adapter_moves_only_where_rewards_differ(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    reward = tmp_path / "equal.py"
    reward.write_text("def equal(completions):\n    return [1.0] * len(completions)\n")
    arguments = {**train_arguments, "rm_model": "none", "reward": (f"{reward}:equal",)}
    run = run_of(TrainConfig(**{**arguments, "kl_control": "none"}))
    adapter = mx.load(str(run / "final" / "adapters.safetensors"))
    assert all((v == 0).all().item() for n, v in adapter.items() if n.endswith("lora_b"))
    iterations = [r for r in rows(run) if "reward" in r]
    assert {r["frac_reward_zero_std"] for r in iterations} == {1.0}
    assert {r["frac_dead_groups"] for r in iterations} == {1.0}
    assert {r["policy/optimizer_steps"] for r in iterations} == {0}


def test_the_recomputed_log_probs_agree_with_those_of_the_rollout(
    train_arguments: dict[str, Any],
) -> None:
    run = run_of(TrainConfig(**train_arguments))
    gaps = [r["sampling/sampling_logp_difference/max"] for r in rows(run) if "reward" in r]
    assert max(gaps) < 1e-4
