"""What people are told to type is quoted for their shell, wherever it is told."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from mlx_grpo.core.commands import command
from mlx_grpo.export.card import usage
from mlx_grpo.report.page import going_on, training_command
from mlx_grpo.report.record import read
from mlx_grpo.report.write import try_report
from mlx_grpo.run.directory import resume_command
from tests.helpers.runs import write_run

PACKAGE = Path(__file__).parents[2] / "mlx_grpo"
HOSTILE = "my runs; touch owned $(id) 'x' \"y\" `z` & *"
BEGINNING = r"\b(mlx-grpo|mlx_lm\.\w+|mlx\.launch|hf|pip|python) [a-z-][\w-]*( [^{}'\"]*)?"
UNQUOTED = re.compile(BEGINNING + r"[ =/]\{[^}]*\}")


def unquoted(source: str) -> list[str]:
    """Texts that put a value into a command without quoting it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            ]
            found += UNQUOTED.findall("".join(parts)) and ["".join(parts)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += UNQUOTED.findall(node.value) and [node.value]
    return found


def test_no_text_puts_a_value_into_a_command_unquoted() -> None:
    places = {
        str(file.relative_to(PACKAGE)): unquoted(file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    places.pop("convert/card.py")  # filled in with a quoted name
    assert {name: texts for name, texts in places.items() if texts} == {}


def test_the_check_sees_what_it_looks_for() -> None:
    assert unquoted('f"go on with: mlx-grpo train --resume --output {run}"')
    assert unquoted('f"type: pip install --no-deps {wheel}"')
    assert unquoted('"hf upload {} {}"') and unquoted("f'mlx_lm.generate --model {model} -p x'")
    assert not unquoted('f"made by mlx-grpo {version}"')
    assert not unquoted('f"try: {command(run)}"')


def test_a_command_reads_back_as_its_words(tmp_path: Path) -> None:
    run = tmp_path / HOSTILE
    assert shlex.split(command("a", run, 3)) == ["a", str(run), "3"]
    words = ["mlx-grpo", "train", "--resume", "--output", str(run)]
    assert shlex.split(resume_command(run)) == words


@pytest.mark.parametrize("form", ["adapter", "fused", "dequantized", "peft"])
def test_the_use_of_an_export_reads_back(form: str) -> None:
    said = usage(form, f"out/{HOSTILE}", f"sft/{HOSTILE}", f"base/{HOSTILE}")
    if form == "peft":
        tree = ast.parse(said)
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        assert set(texts) == {f"out/{HOSTILE}", f"base/{HOSTILE}"}
    else:
        assert f"out/{HOSTILE}" in shlex.split(said)
        assert (f"sft/{HOSTILE}" in shlex.split(said)) == (form == "adapter")


def test_the_commands_of_a_page_read_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / HOSTILE, steps=10, prompts=f"data/{HOSTILE}.jsonl")
    record = read(run, False)
    assert str(run) in shlex.split(going_on(record))
    assert f"data/{HOSTILE}.jsonl" in shlex.split(training_command(record))


def test_the_command_of_a_page_that_was_not_written_reads_back(tmp_path: Path) -> None:
    told: list[str] = []
    assert try_report([tmp_path / HOSTILE, tmp_path / "b"], told.append) is None
    said = shlex.split(told[0].split("try: ")[1])
    assert said == ["mlx-grpo", "report", str(tmp_path / HOSTILE), str(tmp_path / "b")]
