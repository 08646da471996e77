"""The command line: several seeds, resuming with a run's own settings, help and version."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.generate import commands
from mlx_grpo import __version__
from mlx_grpo.cli import app, main
from mlx_grpo.training import loop as trainer
from tests.helpers.interrupted import interrupted_in
from tests.helpers.loops import ending


@pytest.fixture
def flags(train_arguments: dict[str, Any], tmp_path: Path) -> list[str]:
    """The arguments of a run of a second, as flags."""
    given = {**train_arguments, "output": str(tmp_path / "runs"), "num_iterations": 2}
    given |= {"kl_targets": "0.5,0.2", "K": 2}
    return [t for n, v in given.items() for t in (f"--{n.replace('_', '-')}", str(v))]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", *arguments])
    return main()


def steps(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def test_a_command_that_loads_models_leaves_pytorch_alone(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "mlx_grpo", "train", "--dry-run", *flags],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("      starting\n")  # before what takes seconds to import


def test_several_seeds_run_one_after_the_other(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, "train", "--quiet", "--seed", "1", "--seed", "2", *flags) == 0
    finals = [tmp_path / "runs" / f"seed-{s}/final/adapters.safetensors" for s in (1, 2)]
    assert finals[0].read_bytes() != finals[1].read_bytes()


def test_a_stop_during_one_seed_does_not_start_the_next(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_loop", ending(False))
    # a shell's `train && eval` must not go on to eval
    assert command(monkeypatch, "train", "--quiet", "--seed", "1", "--seed", "2", *flags) == 130
    assert not (tmp_path / "runs").exists()
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "_loop", ending(True))
    seen: list[int] = []
    real = trainer.first_state
    monkeypatch.setattr(trainer, "first_state", lambda c: (seen.append(c.run.seed), real(c))[1])
    command(monkeypatch, "train", "--quiet", "--seed", "1", "--seed", "2", *flags)
    assert seen == [1, 2]


def test_a_seed_that_is_given_twice_is_refused_before_the_first_run(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "train", "--seed", "1", "--seed", "1", *flags) == 2
    assert "--seed: the same seed twice" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_resume_needs_no_more_than_the_run_directory(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs"
    with interrupted_in(2):
        assert command(monkeypatch, "train", "--quiet", *flags, "--checkpoint-every", "1") == 130
    assert steps(run) == ["step-000001"]
    assert command(monkeypatch, "train", "--quiet", "--resume", "--output", str(run)) == 0
    assert steps(run) == ["step-000001", "step-000002"]
    assert (run / "final" / "adapters.safetensors").is_file()


def test_a_flag_on_resume_is_checked_with_the_settings_of_the_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = ("--kl-phases", "1,1")  # as many as the run has targets, not as many as the defaults
    again = ("train", "--quiet", "--resume", "--output", str(tmp_path / "runs"), *phases)
    own = ("--kl-targets", "0.5,0.2", *phases, "--checkpoint-every", "1")
    with interrupted_in(2):
        assert command(monkeypatch, "train", "--quiet", *flags, *own) == 130
    assert command(monkeypatch, *again) == 0


def test_resume_refuses_a_flag_that_contradicts_the_run(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "train", "--quiet", *flags) == 0
    again = ("train", "--resume", "--output", str(tmp_path / "runs"), "--clip-range", "0.1")
    assert command(monkeypatch, *again) == 2
    complaint = capsys.readouterr().err
    assert "not what the run was started with: --clip-range 0.2 -> 0.1" in complaint
    assert "--allow-config-change" in complaint
    assert command(monkeypatch, *again, "--allow-config-change") == 0
    assert "clip_range = 0.1" in (tmp_path / "runs" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--num-generations", "--K"),
        ("--beta=0.04", "--kl-targets, which holds the KL at a target"),
        ("--max-steps", "--num-iterations"),
        ("--iters", "--num-iterations"),
        ("--lr", "--learning-rate"),
        ("--model", "--actor-model"),
        ("--reward_funcs", "--reward"),
        ("--epsilon-high", "--clip-range-high"),
    ],
)
def test_a_flag_of_another_trainer_leads_to_ours(
    typed: str,
    ours: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "train", typed, "1") == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"error: No such option: {typed.split('=')[0]}; here it is {ours}")
    assert len(complaint.splitlines()) == 1
    setting = typed.split("=")[0].strip("-").replace("-", "_")
    file = tmp_path / "run.toml"
    file.write_text(f"{setting} = 1\n")
    assert command(monkeypatch, "train", "--config", str(file)) == 2
    field = ours.split(",")[0].strip("-").replace("-", "_")
    assert f"unknown setting '{setting}'; did you mean '{field}'?" in capsys.readouterr().err


def test_a_flag_is_not_led_to_where_the_command_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "report", "--max-steps", "3") == 2
    assert "here it is" not in capsys.readouterr().err


def test_version_and_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"mlx-grpo {__version__}"
    for name in (c.name or "" for c in app.registered_commands):
        assert command(monkeypatch, name, "--help") == 0
        assert f"mlx-grpo {name}" in capsys.readouterr().out


def test_a_shell_completes_commands_and_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (("tr", {"train", "train-rm"}), ("eval --eval-r", {"--eval-reward"})):
        typed = f"mlx-grpo {words}"
        monkeypatch.setenv("_MLX_GRPO_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        with pytest.raises(SystemExit):
            command(monkeypatch)
        assert set(capsys.readouterr().out.split()) == expected


def test_help_is_broken_where_the_terminal_ends_not_where_the_docstring_was() -> None:
    for name, shown in commands().items():
        assert shown.help and "\n" not in shown.help.replace("\n\n", ""), name
