"""Nothing that others wrote steers the terminal: it is shown as what it is."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from mlx_grpo.cli import main
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError, one_line, visible
from mlx_grpo.core.types import Completion, Group, Prompt
from tests.helpers.terminal import python

CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"
ATTACKS = {
    "clipboard": CLIPBOARD,
    "clear": "\x1b[2J\x1b[H",
    "one-character escapes": "\x9d52;c;ZXZpbA==\x9c\x9b2J",
    "title": "\x1b]0;owned\x1b\\",
    "overwriting": "bad\rgood\x08\x08\x7f",
    "direction": "\u202eevil\u2066\u200f",
    "line separators": "a\u2028error: b\u2029",
    "half a pair": "\ud83d",
    "null and bell": "\x00\x07",
}
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

attacks = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


def assert_harmless(text: str) -> None:
    assert "\x1b]" not in text and "\x1b[2J" not in text
    assert not STEERING.search(OURS.sub("", text).replace("\r", "")), repr(text)


def group(text: str) -> Group:
    prompt = Prompt(text, ({"role": "user", "content": f"prompt {text}"},), (1,))
    return Group(prompt, tuple(Completion((1,), f"answer {text}", "stop", (0.0,)) for _ in "abc"))


@attacks
@pytest.mark.parametrize("terminal", [True, False])
def test_whatever_the_console_prints_is_harmless(attack: str, terminal: bool) -> None:
    ui, file = Console(), io.StringIO()
    ui.out = ui.err = RichConsole(file=file, force_terminal=terminal, width=60, soft_wrap=True)
    ui.say(f"said {attack}")
    ui.warn(f"warned {attack}")
    ui.error(f"failed {attack}")
    ui.relay(f"printed {attack}")
    ui.table(f"title {attack}", ("", f"column {attack}"), [(f"name {attack}", f"cell {attack}")])
    ui.table(f"title {attack}", ("a", f"b {attack}"), [(f"{attack}", f"{attack}")], lines=True)
    ui.evaluation(1, dict.fromkeys(EVALUATED, 1.0), f"note {attack}")
    with ui.working(f"doing {attack}"):
        ui.progress(f"done {attack}", 1, 2)
    with ui.training(2), ui.stage(1, "rollout"):
        ui.progress(f"done {attack}", 1, 2)
        ui.samples(1, [group(attack)], [[1.0, 2.0, 3.0]])
    assert_harmless(file.getvalue())
    assert "warned " in file.getvalue() and visible(attack.strip()) in file.getvalue()


EVALUATED = (
    *("eval_reward", "eval_kl", "eval_perplexity", "eval_completions/mean_length"),
    "eval_completions/clipped_ratio",
)


@attacks
def test_an_error_is_one_harmless_line(attack: str) -> None:
    for text in (str(InputError(f"id '{attack}'\nsecond")), one_line(f"{attack}\nsecond")):
        assert_harmless(text)
        assert "\n" not in text and text.endswith("second")


def test_what_is_written_in_any_language_stays() -> None:
    said = "naïve 日本語 العربية עברית हिन्दी 👩‍👩‍👧 e\u0301 — “x”\xa0y"
    assert visible(said) == said == str(InputError(said))
    assert str(InputError("/a  b/c.txt: two blanks")) == "/a  b/c.txt: two blanks"


Setup = Callable[[Path, str], list[str]]


def hostile_id(directory: Path, attack: str) -> list[str]:
    rows = [{"id": attack, "prompt": "x"}] * 2
    file = directory / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", "--prompts", str(file), "--eval-prompts", str(file), "--rm-model", "none"]


def hostile_flag(directory: Path, attack: str) -> list[str]:
    return ["train", "--set", f"{attack}=1"]


def hostile_option(directory: Path, attack: str) -> list[str]:
    return ["train", f"--{attack}"]


def hostile_command(directory: Path, attack: str) -> list[str]:
    return [attack]


def hostile_path(directory: Path, attack: str) -> list[str]:
    return ["report", str(directory / attack)]


def hostile_key(directory: Path, attack: str) -> list[str]:
    file = directory / "c.toml"
    file.write_text(f"{json.dumps(attack)} = 1\n")
    return ["train", "--config", str(file)]


@pytest.mark.parametrize("attack", [CLIPBOARD, ATTACKS["clear"], ATTACKS["direction"]])
@pytest.mark.parametrize(
    "setup",
    [hostile_id, hostile_flag, hostile_option, hostile_command, hostile_path, hostile_key],
)
def test_every_one_line_error_is_harmless(
    setup: Setup,
    attack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sft: Path,
) -> None:
    words = setup(tmp_path, attack)
    if words[0] == "train":
        words += ["--actor-model", str(sft), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", *words])
    assert main() == 2
    out, err = capsys.readouterr()
    assert_harmless(out + err)
    assert len(err.splitlines()) == 1 and err.startswith("error: ")


SCRIPT = """
from mlx_grpo.console.output import Console
from tests.console.test_control_characters import ATTACKS, group
ui = Console()
ui.say("before")
with ui.training(3), ui.stage(1, "reward"):
    for attack in ATTACKS.values():
        ui.warn(f"answer {attack}!")
        ui.relay(f"printed {attack}!")
        ui.samples(1, [group(attack)], [[1.0, 2.0, 3.0]])
"""


def test_a_real_terminal_gets_none_of_it_and_shows_all() -> None:
    shown = python(SCRIPT)
    assert shown.end() == 0
    seen: Any = shown.seen()
    assert b"\x1b]52" not in shown.raw and b"\x1b[2J" not in shown.raw
    assert b"\xc2\x9b" not in shown.raw and b"\xc2\x9d" not in shown.raw
    assert "before" in seen and shown.screen.title == ""
    for attack in ATTACKS.values():
        assert f"warning: answer {visible(attack)}!" in seen, seen
        assert f"printed {visible(attack)}!" in seen, seen
