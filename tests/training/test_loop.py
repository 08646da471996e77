"""A whole run: the same numbers each time, resumable, and nothing left behind by a dry run."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.config.settings import TrainConfig, train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import atomic_directory, read_json
from mlx_grpo.files.lock import locked
from mlx_grpo.files.manifest import write_manifest
from mlx_grpo.report.record import read
from mlx_grpo.run import directory, log, provenance
from mlx_grpo.training.loop import train
from tests.helpers.interrupted import interrupted_in

QUIET = Console(quiet=True)


def run_of(config: TrainConfig, resume: bool = False) -> Path:
    """Train to the end and return the run directory."""
    assert train(config, QUIET, resume=resume)
    return config.run_directory


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [log.repeatable(row) for row in lines]


@pytest.fixture(scope="module")
def whole(run_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted, to be read only."""
    place = tmp_path_factory.mktemp("whole") / "run"
    return run_of(train_config(**run_settings, output=str(place)))


@pytest.fixture
def finished(whole: Path, train_arguments: dict[str, Any]) -> TrainConfig:
    """The configuration of a finished run, a copy of that one."""
    config = train_config(**train_arguments)
    shutil.copytree(whole, config.run_directory)
    return config


def test_the_same_seed_gives_the_same_run_bit_for_bit(
    train_arguments: dict[str, Any], whole: Path
) -> None:
    runs = [whole, run_of(train_config(**train_arguments))]
    assert rows(runs[0]) == rows(runs[1])
    assert len(rows(runs[0])) == 4 + 3  # iterations, and evaluations at 0, 2 and 4
    adapters = [(run / "final" / "adapters.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]


def test_another_seed_gives_another_run(train_arguments: dict[str, Any], whole: Path) -> None:
    other = run_of(train_config(**train_arguments, seed=1))
    assert rows(other)[1]["reward"] != rows(whole)[1]["reward"]


def test_a_resumed_run_equals_the_uninterrupted_one(
    train_arguments: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    config = train_config(**{**train_arguments, "output": str(tmp_path / "broken")})
    with interrupted_in(4), pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    assert rows(config.run_directory)[-1]["step"] == 3  # beyond the checkpoint at 2
    resumed = run_of(config, resume=True)

    assert rows(resumed) == rows(whole)
    for name in ("final/adapters.safetensors", *log.LOGS[1:3], log.EVAL_ANSWERS):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_that_died_before_its_first_checkpoint_starts_again(
    train_arguments: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    config = train_config(**{**train_arguments, "output": str(tmp_path / "broken")})
    with interrupted_in(1), pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    assert len(rows(config.run_directory)) == 1  # the evaluation before the first iteration
    assert rows(run_of(config, resume=True)) == rows(whole)


def assert_equal(run: Path, whole: Path) -> None:
    """The same run, bit for bit."""
    assert rows(run) == rows(whole)
    for name in ("final/adapters.safetensors", *log.LOGS[1:3], log.EVAL_ANSWERS):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        last = "checkpoints/step-000004"
        assert (run / last / name).read_bytes() == (whole / last / name).read_bytes(), name


def step_names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "stage",
    ["rollout", "kl_to_reference", "_old_logps", "update", "adamw_step", "_evaluate"],
)
def test_a_signal_stops_inside_a_stage_and_loses_nothing_before_it(
    stage: str,
    train_arguments: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_grpo.grpo import iteration, update
    from mlx_grpo.training import loop as trainer

    places = {"adamw_step": update, "_old_logps": update, "_evaluate": trainer}
    place: Any = places.get(stage, iteration)
    real, calls = getattr(place, stage), []
    nth = {"adamw_step": 5, "_old_logps": 5, "_evaluate": 2}.get(
        stage, 3
    )  # two optimizer steps an iteration

    def is_told_to_stop(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **named)

    config = train_config(
        **{**train_arguments, "checkpoint_every": 9, "output": str(tmp_path / "s")}
    )
    with monkeypatch.context() as patch:
        patch.setattr(place, stage, is_told_to_stop)
        assert train(config, QUIET) is False
    assert len(calls) == nth
    assert step_names(config.run_directory) == ["step-000002"]
    assert not (config.run_directory / "final").exists()
    assert_equal(run_of(config, resume=True), whole)


def test_a_failure_in_an_iteration_saves_the_ones_before(
    train_arguments: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_grpo.grpo import iteration

    real, calls = iteration.update, []

    def runs_out_of_memory(*args: Any) -> Any:
        calls.append(1)
        done = real(*args)
        if len(calls) == 3:
            raise RuntimeError("[METAL] Insufficient Memory")
        return done

    config = train_config(
        **{**train_arguments, "checkpoint_every": 9, "output": str(tmp_path / "s")}
    )
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Insufficient"):
        patch.setattr(iteration, "update", runs_out_of_memory)
        train(config, QUIET)
    assert step_names(config.run_directory) == ["step-000002"]
    assert_equal(run_of(config, resume=True), whole)


def test_a_best_adapter_moved_aside_when_the_process_died_is_brought_back(
    finished: TrainConfig,
) -> None:
    best = finished.run_directory / "best"
    content = (best / "adapters.safetensors").read_bytes()
    best.rename(best.with_name(".best.old"))
    best.with_name(".best.x1.tmp").mkdir()
    run_of(finished, resume=True)
    assert (best / "adapters.safetensors").read_bytes() == content
    assert not list(finished.run_directory.glob(".*"))


def test_a_full_disk_is_seen_before_the_run_and_before_a_save(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_grpo.files import atomic as files

    free: list[int] = [0]
    usage = type("Usage", (), {"free": property(lambda self: free[0])})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage())
    # --keep exceeds what will ever be written: the rest needs no space
    config = train_config(**{**train_arguments, "eval_every": 99, "keep": 10**9})
    with pytest.raises(InputError, match=r"0 MB free on its disk, \d+ MB needed; .*--keep"):
        train(config, QUIET)
    assert not config.run_directory.exists()

    def fills_up_after_the_first_checkpoint(_: Any) -> Any:
        saved = (config.run_directory / "checkpoints").exists()
        free[0] = 1000 if saved else 10**12
        return usage()

    monkeypatch.setattr(files.shutil, "disk_usage", fills_up_after_the_first_checkpoint)
    with pytest.raises(InputError, match=r"0 MB free on its disk.*continue with --resume"):
        train(config, QUIET)
    assert step_names(config.run_directory) == ["step-000002"]
    monkeypatch.undo()
    run_of(config, resume=True)


def test_what_a_run_has_written_needs_no_space_again(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = train_config(**train_arguments), list[int]()
    monkeypatch.setattr(directory, "need_space", lambda place, size, remedy: asked.append(size))
    with interrupted_in(3), pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    run, at_first = config.run_directory, asked[0]
    written = [*run.glob("*.jsonl"), *(p for p in run.glob("*/**/*") if p.is_file())]
    size = sum(file.stat().st_size for file in written)
    asked.clear()
    run_of(config, resume=True)
    assert asked[0] == at_first - size


def test_a_second_run_in_the_same_directory_is_refused(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(**train_arguments)
    with (
        locked(config.run_directory),
        pytest.raises(InputError, match=f"in use by process {os.getpid()}; wait"),
    ):
        train(config, QUIET)
    assert not config.run_directory.exists()


def test_resume_with_changed_prompts_is_refused(finished: TrainConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path(finished.data.prompts).read_text() + '{"prompt": "more"}\n')
    with pytest.raises(InputError, match="--prompts other content"):
        train(with_settings(finished, prompts=str(prompts)), QUIET, resume=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"clip_range": 0.1}, r"--clip-range 0\.2 -> 0\.1"),
        ({"num_iterations": 6}, "--num-iterations 4 -> 6"),
        ({"K": 2, "kl_targets": (0.3,)}, r"--K 3 -> 2; --kl-targets 0\.5,0\.2 -> 0\.3"),
    ],
)
def test_resume_with_other_mathematics_is_refused_with_the_list(
    finished: TrainConfig, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=f"not what the run was started with: {complaint}; put"):
        train(with_settings(finished, **change), QUIET, resume=True)


def test_a_change_that_is_wanted_is_told_and_takes_effect(
    finished: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = with_settings(
        finished, num_iterations=5, learning_rate=1e-4, kl_beta=3.0, kl_control="reward"
    )
    assert train(changed, QUIET, resume=True, allow_change=True)
    warnings = capsys.readouterr().err
    assert "changed since the checkpoint: --learning-rate 0.01 -> 0.0001" in warnings
    last = next(r for r in rows(finished.run_directory) if r["step"] == 5)
    assert (last["learning_rate"], last["kl/beta"]) == (1e-4, 3.0)


def undone(finished: TrainConfig, best: int) -> Path:
    """The run, back at its checkpoint at 2, with a `best/` of another iteration."""
    run = finished.run_directory
    assert read_json(run / "checkpoints" / "step-000002" / "state.json")["best"]["step"] == 2
    shutil.rmtree(run / "checkpoints" / "step-000004")
    with atomic_directory(run / "best", replace=True) as temporary:
        shutil.copy(run / "final" / "adapters.safetensors", temporary)
        write_manifest(temporary, {"step": best})
    return run


def test_best_of_an_iteration_that_other_settings_undo_is_chosen_anew(
    finished: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = undone(finished, best=4)
    last = with_settings(finished, learning_rate=0.5, kl_control="none")
    assert train(last, QUIET, resume=True, allow_change=True)
    assert "best/ was of iteration 4, which is undone" in capsys.readouterr().err
    assert not rows(run)[-1]["eval_best"] and not (run / "best").exists()


def test_best_of_an_iteration_that_is_done_again_comes_out_the_same(
    finished: TrainConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(with_settings(finished, output=str(undone(finished, best=4))), resume=True)
    assert rows(run) == rows(whole)
    assert "undone" not in capsys.readouterr().err


def test_what_evaluations_are_made_of_cannot_change_under_best(
    finished: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "others.jsonl"
    prompts.write_text('{"prompt": "other", "response": "one"}\n')
    others = with_settings(finished, eval_prompts=str(prompts), num_iterations=5)
    assert train(others, QUIET, resume=True, allow_change=True)
    assert "best/ is chosen anew" in capsys.readouterr().err
    assert rows(finished.run_directory)[-1]["eval_without_gain"] == 0


def test_an_adapter_of_another_rank_is_never_resumed(finished: TrainConfig) -> None:
    with pytest.raises(InputError, match="does not fit --actor-model, --lora-rank"):
        train(with_settings(finished, lora_rank=2), QUIET, resume=True, allow_change=True)


def test_what_changes_no_number_is_free_and_rounding_and_versions_are_told(
    finished: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(finished.data.prompts).read_bytes())
    free = with_settings(finished, keep=1, checkpoint_every=3, prompts=str(moved))
    assert train(free, QUIET, resume=True)
    assert capsys.readouterr().err == ""
    versions = provenance.versions()
    monkeypatch.setattr(provenance, "versions", lambda: {**versions, "mlx": "9.9"})
    assert train(with_settings(finished, decode_rows=3), QUIET, resume=True)
    warnings = capsys.readouterr().err
    assert "last bits may differ: --decode-rows 0 -> 3" in warnings
    assert f"mlx {versions['mlx']} -> 9.9" in warnings


def test_a_changed_reward_function_is_seen_on_resume(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(completions):\n    return [len(c) for c in completions]\n")
    config = train_config(**{**train_arguments, "reward": (f"{reward}:mine",)})
    run_of(config)
    reward.write_text("def mine(completions):\n    return [-len(c) for c in completions]\n")
    with pytest.raises(InputError, match="--reward mine other content"):
        train(config, QUIET, resume=True)


def test_a_dry_run_keeps_nothing(train_arguments: dict[str, Any], tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    train(train_config(**train_arguments), QUIET, dry_run=True)
    assert set(tmp_path.rglob("*")) == before


def test_a_run_directory_in_use_is_refused(train_arguments: dict[str, Any]) -> None:
    config = train_config(**train_arguments)
    config.run_directory.mkdir()
    (config.run_directory / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--resume or choose another --output"):
        train(config, QUIET)
    assert [p.name for p in config.run_directory.iterdir()] == ["notes.txt"]


def test_a_run_that_died_before_it_began_is_not_in_the_way(train_arguments: dict[str, Any]) -> None:
    config = train_config(**{**train_arguments, "num_iterations": 1})
    config.run_directory.mkdir()
    for name in (".lock", ".config.toml.tmp"):
        (config.run_directory / name).write_text("left over")
    run_of(config)
    assert not list(config.run_directory.glob(".*"))


def test_nothing_is_crowned_best_when_nothing_passes_the_gate(
    train_arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(train_config(**{**train_arguments, "kl_targets": (1e-9,)}))
    assert not (run / "best").exists()
    assert (run / "final" / "adapters.safetensors").is_file()
    assert "no evaluation passed the KL gate" in capsys.readouterr().err


def test_an_adapter_moves_only_where_rewards_differ(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    reward = tmp_path / "equal.py"
    reward.write_text("def equal(completions):\n    return [1.0] * len(completions)\n")
    arguments = {**train_arguments, "rm_model": "none", "reward": (f"{reward}:equal",)}
    run = run_of(train_config(**{**arguments, "kl_control": "none"}))
    adapter = mx.load(str(run / "final" / "adapters.safetensors"))
    assert all((v == 0).all().item() for n, v in adapter.items() if n.endswith("lora_b"))
    iterations = [r for r in rows(run) if "reward" in r]
    assert {r["frac_reward_zero_std"] for r in iterations} == {1.0}
    assert {r["frac_dead_groups"] for r in iterations} == {1.0}
    assert {r["policy/optimizer_steps"] for r in iterations} == {0}


def test_decay_keeps_a_run_nearer_to_the_reference(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**train_arguments, "kl_targets": (1e-4,), "kl_schedule": "constant"}
    last = {}
    for control in ("decay", "none"):
        run = run_of(
            train_config(**{**arguments, "kl_control": control, "output": str(tmp_path / control)})
        )
        last[control] = [r for r in rows(run) if "reward" in r][-1]
    assert last["decay"]["kl"] < 0.7 * last["none"]["kl"]
    assert last["decay"]["kl/decay"] > 0 == last["none"]["kl/decay"]


def test_the_recomputed_log_probs_agree_with_those_of_the_rollout(whole: Path) -> None:
    gaps = [r["sampling/sampling_logp_difference/max"] for r in rows(whole) if "reward" in r]
    assert max(gaps) < 1e-4


def test_a_gold_judge_is_measured_and_changes_nothing(
    train_arguments: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    with_gold = {"eval_reward": ("mlx_grpo.rubric:gold",), "output": str(tmp_path / "gold")}
    run = run_of(train_config(**{**train_arguments, **with_gold}))
    final = "final/adapters.safetensors"
    assert (run / final).read_bytes() == (whole / final).read_bytes()
    assert all("rewards/gold/mean" in r or "eval_rewards/gold/mean" in r for r in rows(run))


def test_every_held_out_answer_is_logged_with_its_rewards(whole: Path) -> None:
    answers = log.read(whole / log.EVAL_COMPLETIONS)
    assert Counter(a["step"] for a in answers) == {0: 3, 2: 3, 4: 3}
    for row in rows(whole):
        if "eval_reward" in row:
            given = [a["reward"] for a in answers if a["step"] == row["step"]]
            assert sum(given) / len(given) == pytest.approx(row["eval_reward"])
    assert {"id", "prompt", "completion", "finish_reason", "rewards/reward_model"} < set(answers[0])


def test_a_run_ends_when_what_chooses_best_has_not_improved_for_so_long(
    train_arguments: dict[str, Any], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the KL only grows at first, so the first evaluation stays the best
    changes = {"metric_for_best_model": "kl", "early_stopping_patience": 1, "eval_every": 1}
    config = train_config(**{**train_arguments, **changes})
    assert train(config, Console())
    evaluations = [r for r in rows(config.run_directory) if "eval_reward" in r]
    assert [r["eval_without_gain"] for r in evaluations] == [0, 0, 1]
    assert evaluations[2]["eval_kl"] > evaluations[1]["eval_kl"]
    assert "kl did not improve in the last evaluation; to go on" in capsys.readouterr().out
    assert step_names(config.run_directory) == ["step-000002"]
    assert (config.run_directory / "final").is_dir()
    record = read(config.run_directory, running=False)
    assert record.finished and record.ended_early
    assert record.decisions()[2][2] == "kl not better"

    again = run_of(config, resume=True)  # it is over, and stays so
    assert rows(again)[-1]["step"] == 2
    patient = run_of(with_settings(config, early_stopping_patience=0), resume=True)
    same = [r for r in rows(patient) if "reward" in r]
    assert same == [r for r in rows(whole) if "reward" in r]


def test_a_figure_that_no_evaluation_has_cannot_choose(train_arguments: dict[str, Any]) -> None:
    config = train_config(**train_arguments, metric_for_best_model="gold")
    with pytest.raises(InputError, match="no figure 'gold'; choose one of reward, kl, perplexity"):
        train(config, QUIET)
    assert not (config.run_directory / "config.toml").exists()


def test_completions_that_are_cut_off_can_be_left_out_and_long_ones_punished(
    train_arguments: dict[str, Any],
) -> None:
    changes = {"truncated": "mask", "soft_punish_cache": 64, "num_iterations": 1}
    config = train_config(**{**train_arguments, **changes, "max_completion_length": 64})
    run = run_of(config)
    answers = log.read(run / log.COMPLETIONS)
    for step, row in enumerate((r for r in rows(run) if "reward" in r), 1):
        assert row["rewards/soft_overlong_punishment/mean"] == pytest.approx(
            -row["completions/mean_length"] / 64
        )
        ended = [a["finish_reason"] == "stop" for a in answers if a["step"] == step]
        groups = [ended[i : i + 3] for i in range(0, len(ended), 3)]
        assert row["frac_dead_groups"] == sum(not any(g) for g in groups) / len(groups)
    assert 0 < sum(a["finish_reason"] == "stop" for a in answers) < len(answers)


def test_greedy_answers_stand_beside_the_sampled_ones(whole: Path) -> None:
    shown = log.read(whole / log.EVAL_ANSWERS)
    assert Counter(a["step"] for a in shown) == {0: 3, 2: 3, 4: 3}
    assert {a["temperature"] for a in shown} == {0.0}
    sampled = log.read(whole / log.EVAL_COMPLETIONS)
    assert [a["completion"] for a in shown] != [a["completion"] for a in sampled]


def test_answers_are_taken_once_where_people_are_shown_the_samples(
    train_arguments: dict[str, Any], whole: Path
) -> None:
    run = run_of(train_config(**train_arguments, eval_temperature=1.0))
    assert not (run / log.EVAL_ANSWERS).exists()
    assert rows(run) == rows(whole)
