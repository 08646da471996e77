"""Other trainers' flags lead to ours."""

import re
from collections import Counter
from pathlib import Path

import pytest

from mlx_grpo.config.other_names import NOTES, OTHER_NAMES, ours_for
from mlx_grpo.config.settings import SETTINGS, flag_of

OURS = set(SETTINGS)
PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
NAME = re.compile(r"`-{0,2}([\w-]+)`")


def test_every_name_leads_to_one_field_of_ours_and_is_none_itself() -> None:
    assert OTHER_NAMES.keys() | NOTES.keys() <= OURS
    counts = Counter(name for names in OTHER_NAMES.values() for name in names)
    assert not OURS & counts.keys()
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("typed", ["--num-generations", "num_generations", "--NUM_GENERATIONS"])
def test_a_name_is_known_however_it_is_written(typed: str) -> None:
    assert ours_for(typed) == ("K", "")


def test_an_unknown_name_leads_nowhere() -> None:
    assert ours_for("--numgen") is None and ours_for("") is None


def rows_of_the_page() -> list[tuple[list[str], str]]:
    """Of each row of the documentation's tables: the other trainers' names, and ours."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines()]
    rows = [cells for cells in lines if len(cells) == 5]
    return [(NAME.findall(" ".join(cells[1:4])), cells[4]) for cells in rows]


def test_the_page_for_those_who_come_from_other_trainers_leads_where_the_program_does() -> None:
    known = {
        (name, flag_of(found[0])): ours
        for names, ours in rows_of_the_page()
        for name in names
        if name not in OURS and (found := ours_for(name))  # one that we have too is taken as ours
    }
    assert len(known) > 25
    assert [pair for pair, ours in known.items() if f"`{pair[1]}" not in ours] == []


def test_every_flag_on_that_page_is_one_of_ours() -> None:
    flags = {f for _, ours in rows_of_the_page() for f in re.findall(r"--\w[\w-]*", ours)}
    ours = {flag_of(name) for name in SETTINGS}
    assert flags - ours == {"--sft", "--bits", "--resume", "--config"}


def test_our_own_name_is_known_with_underscores() -> None:
    assert ours_for("--learning_rate") == ("learning_rate", "")
    found, note = ours_for("--num_iterations") or ("", "")
    assert found == "num_iterations" and "--epochs" in note
