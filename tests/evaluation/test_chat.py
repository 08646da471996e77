"""A talk with both models: the same question, the same random numbers, on a terminal and a pipe."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import STEERING, InputError
from mlx_grpo.data.prompts import read_prompts
from mlx_grpo.evaluation.chat import answer, open_chat, system_message
from tests.helpers.paths import ROOT
from tests.helpers.terminal import mlx_grpo
from tests.helpers.tiny import write_jsonl

QUIET = Console(quiet=True)


def test_both_are_asked_alike_and_draw_alike(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    file = run / "best" / "adapters.safetensors"
    nothing = {name: mx.zeros_like(value) for name, value in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), nothing)
    (run / "best" / "manifest.json").unlink()
    chat = open_chat(run, "best", QUIET)
    assert (chat.most, chat.temperature) == (8, 1.0)
    first, second = (["".join(answer(chat, s, "why tea?", 0)) for _ in "ab"] for s in chat.sides)
    assert first == second and first[0] == first[1]
    trained = open_chat(finished_run, "final", QUIET, most=40)
    assert len({"".join(answer(trained, s, "why tea?", 0)) for s in trained.sides}) == 2
    assert "".join(answer(trained, trained.sides[0], "why tea?", 1)) != first[0]


def test_the_likeliest_token_needs_no_random_number(finished_run: Path) -> None:
    chat = open_chat(finished_run, "", QUIET, temperature=0.0)
    assert len({"".join(answer(chat, chat.sides[1], "why?", turn)) for turn in range(3)}) == 1


def test_the_system_message_of_all_prompts_opens_the_talk(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, {"role": "user", "content": w}]} for w in ("tea", "rain")]
    assert system_message(read_prompts(write_jsonl(tmp_path / "a.jsonl", rows))) == (system,)
    rows.append({"messages": [{"role": "user", "content": "bees"}]})
    assert system_message(read_prompts(write_jsonl(tmp_path / "b.jsonl", rows))) == ()


def test_a_run_without_that_adapter_is_one_line(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--adapter: must be best or final, not 'first'"):
        open_chat(finished_run, "first", QUIET)
    with pytest.raises(InputError, match="no run here"):
        open_chat(tmp_path, "", QUIET)


def test_that_tools_are_left_out_is_said(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    settings = (run / "config.toml").read_text()
    assert 'environment = ""' in settings
    of_a_game = settings.replace('environment = ""', 'environment = "gone.py:Game"')
    (run / "config.toml").write_text(of_a_game)
    chat = open_chat(run, "final", QUIET)
    assert "'gone.py:Game', takes no part in a chat" in capsys.readouterr().err
    assert "".join(answer(chat, chat.sides[1], "why?", 0))


def test_each_line_of_a_pipe_is_answered_on_its_own(finished_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_grpo", "chat", str(finished_run), "--checkpoint", "final"],
        input=b"why tea?\n\nwhy \xff?\n",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode()
    assert said.count("SFT model\n") == said.count("after GRPO (final)\n") == 2
    assert "why tea?\n" in said and "why \N{REPLACEMENT CHARACTER}?\n" in said
    assert not STEERING.search(said.replace("\n", ""))


def test_a_talk_on_a_terminal_goes_on_after_ctrl_c_and_ends_with_ctrl_d(
    finished_run: Path,
) -> None:
    terminal = mlx_grpo("chat", str(finished_run), "--max-completion-length", "100000")
    terminal.until("Ctrl-D ends.")
    terminal.until_shown("\n> ")
    terminal.send(b"why tea?\n")
    terminal.until("SFT model")  # it would go on for hours
    terminal.send(b"\x03")
    terminal.until("after GRPO (best)")
    terminal.send(b"/new\n")
    terminal.until("> /new\n>")
    terminal.send(b"\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen()


def test_ctrl_c_where_nothing_is_answered_ends_the_talk(finished_run: Path) -> None:
    terminal = mlx_grpo("chat", str(finished_run))
    terminal.until("ends.\n>")
    terminal.send(b"why tea?\n")
    terminal.until("\n\n>")  # both have answered
    terminal.until_it_waits()
    terminal.send(b"\x03")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen() and "error" not in terminal.seen()
