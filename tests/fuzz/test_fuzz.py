"""A few hundred malformed inputs; `make torture` runs thousands."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz import cases

few = settings(
    max_examples=80,
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Any:
    return cases.tokenizer_in(place)


@few
@given(cases.lines(cases.PROMPT_ROW))
def test_a_prompts_file_is_read_or_refused_in_one_line(
    place: Path, tokenizer: Any, content: bytes
) -> None:
    cases.check_prompts(content, place, tokenizer)


@few
@given(cases.lines(cases.PAIR_ROW))
def test_a_preference_file_is_read_or_refused_in_one_line(
    place: Path, tokenizer: Any, content: bytes
) -> None:
    cases.check_pairs(content, place, tokenizer)


@few
@given(st.lists(cases.SETTING, max_size=4))
def test_settings_are_taken_or_refused_in_one_line(
    place: Path, setting: list[tuple[Any, Any]]
) -> None:
    cases.check_config(setting, place)


@few
@given(cases.REWARDS)
def test_what_a_reward_returns_is_taken_or_refused_in_one_line(returned: Any) -> None:
    cases.check_reward(returned)
