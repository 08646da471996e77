"""The blind comparison: who stands where is known to the file only."""

from pathlib import Path
from typing import Any

import pytest

from bench.learning.blind import answers, counted, sheet
from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.training.loop import train

ROWS = [
    {"prompt": "one", "answers": ["new", "old"], "trained": 0},
    {"prompt": "two", "answers": ["old", "new"], "trained": 1},
    {"prompt": "three", "answers": ["old", "new"], "trained": 1},
]


def test_letters_are_places_and_not_policies() -> None:
    found = counted(ROWS, "AAT")
    assert [row["chosen"] for row in found] == ["trained", "SFT", "tie"]
    assert all((row["SFT"], row["trained"]) == ("old", "new") for row in found)


@pytest.mark.parametrize("choices", ["AB", "ABAB", "ABC", "aba"])
def test_a_letter_is_wanted_for_each(choices: str) -> None:
    with pytest.raises(InputError, match="give 3 letters"):
        counted(ROWS, choices)


def test_the_sheet_does_not_say_whose_answer_it_is(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = train_config(**train_arguments)
    train(config, Console(quiet=True))
    rows = answers(config.run_directory, Console(quiet=True))
    assert rows == answers(config.run_directory, Console(quiet=True))
    assert {row["trained"] for row in rows} <= {0, 1}
    shown = sheet(rows)
    assert "trained" not in shown and all(row["prompt"] in shown for row in rows)
