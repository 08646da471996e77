"""However the one who watches goes away, the work is kept and told as at SIGTERM."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import to_toml
from mlx_grpo.run.checkpoint import load_newest
from tests.helpers.terminal import ROOT, Terminal

SLOW = """
import time
def slow(completions):
    time.sleep(0.05)
"""
RETURN = "    return [-len(c) for c in completions]\n"


@pytest.fixture
def command(train_arguments: dict[str, Any], tmp_path: Path) -> list[str]:
    """A run that would take minutes, with a checkpoint at its end only."""
    (tmp_path / "slow.py").write_text(SLOW + RETURN)
    changes = {
        "rm_model": "none",
        "reward": (f"{tmp_path / 'slow.py'}:slow",),
        "num_iterations": 1000,
        "checkpoint_every": 1000,
        "eval_every": 1000,
    }
    config = tmp_path / "config.toml"
    config.write_text(to_toml(train_config(**{**train_arguments, **changes})))
    return [sys.executable, "-m", "mlx_grpo", "train", "--config", str(config)]


@pytest.fixture
def shells() -> Iterator[list[Terminal]]:
    """Terminals whose programs end with the test."""
    started: list[Terminal] = []
    yield started
    for terminal in started:
        terminal.kill()


def assert_kept(run: Path) -> None:
    checkpoint, skipped = load_newest(run / "checkpoints")
    assert checkpoint.iteration >= 1 and not skipped
    page = (run / "report.html").read_text()
    assert "mlx-grpo train --resume" in re.sub("<[^>]+>", "", page)
    assert 'http-equiv="refresh"' not in page
    assert not (run / ".lock").exists()


def test_a_reader_that_has_seen_enough_loses_no_work(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert running.stdout and running.stderr
    while "   2/1000  reward" not in running.stdout.readline():
        pass
    running.stdout.close()
    told = running.stderr.read()
    assert running.wait(60) == 130
    assert told == (
        "warning: stopped early; resume with: mlx-grpo train --resume --output "
        f"{shlex.quote(str(tmp_path / 'run'))}\n"
    )
    assert_kept(tmp_path / "run")


def test_both_streams_may_lose_their_reader(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"{shlex.join(command)} 2>&1 | sed -u '/^ *1.1000  reward/q'"
    whole = subprocess.run(
        ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env=environment,
        start_new_session=True,
        timeout=120,
    )
    assert (whole.returncode, whole.stderr) == (130, "")
    assert_kept(tmp_path / "run")


def test_ctrl_c_on_a_terminal_leaves_the_warnings_the_picture_and_the_hint(
    command: list[str], tmp_path: Path, shells: list[Terminal]
) -> None:
    (tmp_path / "slow.py").write_text(SLOW + "    print('said by the reward')\n" + RETURN)
    shells.append(Terminal([*command, "--num-iterations", "1000", "--eval-every", "2"]))
    shells[0].until("   2  held-out")
    shells[0].send(b"\x03")
    assert shells[0].end() == 130
    seen = shells[0].seen()
    told = " ".join(seen.split())  # the command has a line of its own
    assert told.count("warning: stopped early; resume with: mlx-grpo train --resume") == 1, seen
    assert seen.count("said by the reward") >= 6, seen
    assert [seen.count(piece) for piece in ("iterations ━", "peak memory")] == [1, 1], seen
    log = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r["step"] for r in log if "eval_kl" in r]
    assert [seen.count(f"{step:>4}  held-out") for step in evaluated] == [1] * len(evaluated), seen
    assert_kept(tmp_path / "run")


def test_ctrl_c_through_tee_ends_as_without_it(
    command: list[str], tmp_path: Path, shells: list[Terminal]
) -> None:
    script = f"{shlex.join(command)} 2>&1 | tee {tmp_path / 'log'}; echo code ${{PIPESTATUS[0]}}"
    shells.append(Terminal(["bash", "-c", f"trap : INT; {script}"]))
    shells[0].until("   2/1000  reward")
    shells[0].send(b"\x03")
    assert shells[0].end() == 0
    seen = shells[0].seen()
    assert "code 130" in seen, seen
    assert "resume with: mlx-grpo train --resume --output" in seen, (
        seen
    )  # past tee, which has ended
    assert_kept(tmp_path / "run")


@pytest.mark.parametrize("shell_too", [False, True])
def test_a_terminal_that_closes_ends_as_sigterm_does(
    command: list[str], tmp_path: Path, shells: list[Terminal], shell_too: bool
) -> None:
    if shell_too:  # a shell sends the signal again, to each of its jobs
        command = ["bash", "-ic", f"set -m; {shlex.join(command)}; true"]
    shells.append(Terminal(command))
    shells[0].until("2/1000")
    pid = int((tmp_path / "run" / ".lock").read_text())
    shells[0].hang_up()
    if not shell_too:
        assert shells[0].process.wait(60) == 130
    wait_for_end(pid)
    assert_kept(tmp_path / "run")


@pytest.mark.parametrize("words", [("doctor",), ("train", "--help"), ("plan", "--help")])
def test_other_commands_end_quietly_where_nobody_reads(words: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [sys.executable, "-m", "mlx_grpo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert running.stdout and running.stderr
    running.stdout.close()
    assert "Traceback" not in running.stderr.read()
    assert running.wait(120) in (0, 1, 120)


def wait_for_end(pid: int) -> None:
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError("still there after a minute")


def test_what_was_started_to_outlive_its_terminal_does(
    command: list[str], tmp_path: Path, shells: list[Terminal]
) -> None:
    kept = f"exec nohup {shlex.join(command)} > {tmp_path / 'out'} 2>&1"
    shells.append(Terminal(["sh", "-c", kept]))
    log = tmp_path / "run" / "metrics.jsonl"
    while shells[0].process.poll() is None and not log.exists():
        signal.sigtimedwait([], 0.1)
    os.kill(shells[0].process.pid, signal.SIGHUP)
    before = log.stat().st_size
    while shells[0].process.poll() is None and log.stat().st_size < before + 4000:
        signal.sigtimedwait([], 0.1)
    assert shells[0].process.poll() is None
