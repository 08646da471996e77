"""Machines with few open files, poor encodings, closed streams, narrow screens, a strict umask."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import to_toml
from mlx_grpo.files.atomic import atomic_directory
from tests.helpers.terminal import ROOT, Terminal
from tests.helpers.tiny import write_jsonl

POOR: dict[str, dict[str, str]] = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "LANG": {"LANG": "C", "LC_ALL": ""},
}


@pytest.fixture
def config(train_arguments: dict[str, Any], tmp_path: Path) -> Path:
    """A run of two iterations whose prompts and reward speak other languages."""
    rows = [{"id": f"日本 {i}", "prompt": f"naïve — 日本語 {i}", "response": "é"} for i in range(8)]
    prompts = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    (tmp_path / "mine.py").write_text(
        "def f(completions):\n    print('printed — 日本語')\n"
        "    return [len(c) for c in completions]\n",
        encoding="utf-8",
    )
    changes = {"prompts": prompts, "eval_prompts": prompts, "num_iterations": 2, "show_every": 1}
    changes |= {"rm_model": "none", "reward": (f"{tmp_path / 'mine.py'}:f",)}
    file = tmp_path / "config.toml"
    file.write_text(to_toml(train_config(**{**train_arguments, **changes})))
    return file


def mlx_grpo(*words: str, **named: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **named.pop("environment", {})}
    command = [sys.executable, "-m", "mlx_grpo", *words]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, **named)


@pytest.mark.parametrize("files", [256, 1024, 2048])
def test_few_open_files_are_enough(config: Path, files: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    done = mlx_grpo("train", "--dry-run", "--config", str(config), preexec_fn=limit)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("environment", POOR.values(), ids=POOR)
def test_an_encoding_that_lacks_characters_ends_nothing(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    done = mlx_grpo("train", "--config", str(config), environment=environment)
    assert done.returncode == 0, done.stderr
    assert b"2/2  reward" in done.stdout and b"printed" in done.stderr
    assert b"Error" not in done.stderr and b"Traceback" not in done.stderr
    if environment.get("PYTHONIOENCODING"):
        assert b"\\u65e5" in done.stderr
    assert "日本語" in (tmp_path / "run" / "completions.jsonl").read_text(encoding="utf-8")
    for words in (("eval", str(tmp_path / "run")), ("train", "--help"), ("plan", "--config", "x")):
        done = mlx_grpo(*words, environment=environment)
        assert done.returncode == (2 if words[0] == "plan" else 0), done.stderr
        assert b"Traceback" not in done.stderr


def test_a_terminal_without_line_characters_gets_lines_and_a_plain_spinner(config: Path) -> None:
    shown = Terminal(
        [sys.executable, "-m", "mlx_grpo", "train", "--config", str(config)],
        PYTHONIOENCODING="ascii",
    )
    assert shown.end() == 0
    assert "2/2  reward" in shown.seen() and "printed" in shown.seen()
    assert shown.raw.isascii()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_nothing(config: Path, tmp_path: Path, closed: str) -> None:
    command = f"exec {sys.executable} -m mlx_grpo train --config {config} {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final").is_dir()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o027, 0o750)])
def test_what_is_written_is_as_open_as_the_umask_says(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "made" / "inner") as temporary:
            (temporary / "file").touch()
    finally:
        os.umask(before)
    for directory in (tmp_path / "made", tmp_path / "made" / "inner"):
        assert directory.stat().st_mode & 0o777 == mode
    assert (tmp_path / "made" / "inner" / "file").stat().st_mode & 0o777 == mode & 0o666


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_whole_run_on_a_narrow_screen_loses_no_figure(config: Path, columns: int) -> None:
    shown = Terminal(
        [sys.executable, "-m", "mlx_grpo", "train", "--config", str(config)],
        columns=columns,
        lines=40,
    )
    assert shown.end() == 0
    seen = "".join(shown.seen().split())
    for text in ("2/2", "reward", "KL", "clipfraction", "peakmemory", "GB", "length", "target0."):
        assert text in seen, shown.seen()
    assert "done:" in seen and "AnswersofIteration2" not in seen
