"""The table of model families: complete, and each kind of result told as it is."""

import sys

import pytest

from bench import families_table
from bench.decoders import CONFIGS
from bench.families_table import MARKER, PAGE, Outcome, outcome, outcomes, rows

DIES_AT_THE_SECOND = """
import json, sys
for name in sys.argv[1:]:
    if name == "b":
        sys.exit(3)
    print(json.dumps({"name": name}), flush=True)
"""


def test_every_configuration_stands_in_the_page_once() -> None:
    table = PAGE.read_text(encoding="utf-8").split(MARKER)[1]
    named = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[4:]]
    assert named == list(CONFIGS), "run: python -m bench.families_table"


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "falcon_h1", "gemma3n", "gpt2", "gpt_oss"])
def test_a_family_works_as_actor_as_reward_model_and_in_4_bits(name: str) -> None:
    found = outcome(name)
    assert found.works and not found.packed
    assert 0 < found.coverage < 1


def test_a_family_that_cannot_be_taken_apart_is_refused_in_a_line() -> None:
    found = outcome("nanbeige loops")
    assert "'nanbeige' is not supported" in found.refusal and "\n" not in found.refusal
    assert not found.works


def test_a_configuration_that_ends_its_process_does_not_end_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(families_table, "COMMAND", [sys.executable, "-c", DIES_AT_THE_SECOND])
    found = list(outcomes(["a", "b", "c"]))
    assert [o.name for o in found] == ["a", "b", "c"]
    assert [o.actor for o in found] == ["", "ends the process, status 3", ""]
    assert not found[1].works


def test_a_fault_stands_in_its_own_column() -> None:
    text = rows([Outcome("a"), Outcome("b", reward="score off by 1"), Outcome("c", packed="x|y")])
    assert "2 of 3 configurations work, 1 of them in 4 bits as well." in text
    assert "| b | yes | score off by 1 | yes | 0% |" in text and "| c | yes | yes | x/y |" in text
