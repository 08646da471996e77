"""Other trainers' flags lead to ours."""

from collections import Counter

import pytest

from mlx_grpo.config.other_names import NOTES, OTHER_NAMES, ours_for
from mlx_grpo.config.settings import SETTINGS

OURS = set(SETTINGS)


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
