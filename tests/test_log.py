"""A log is whole lines: appended, cut back on resume, never otherwise rewritten."""

from pathlib import Path

import pytest

from mlx_grpo import log

ROWS = [{"step": step, "reward": step / 3, "text": "naïve\nline"} for step in range(1, 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / log.METRICS


def test_what_is_appended_reads_back_the_same(path: Path) -> None:
    log.append(path, *ROWS[:3])
    log.append(path, *ROWS[3:])
    assert log.read(path) == ROWS
    assert path.read_bytes().count(b"\n") == len(ROWS)


def test_appending_leaves_earlier_bytes_alone(path: Path) -> None:
    log.append(path, ROWS[0])
    before = path.read_bytes()
    log.append(path, ROWS[1])
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("iteration", [0, 1, 3, 5, 9])
def test_truncating_keeps_the_lines_up_to_an_iteration(path: Path, iteration: int) -> None:
    log.append(path, *ROWS)
    log.truncate(path, iteration)
    assert log.read(path) == ROWS[:iteration]
    assert [p.name for p in path.parent.iterdir()] == [log.METRICS]


def test_several_rows_of_one_iteration_stay_together(path: Path) -> None:
    log.append(path, {"step": 1}, {"step": 2, "a": 1}, {"step": 2, "b": 1}, {"step": 3})
    log.truncate(path, 2)
    assert log.read(path) == [{"step": 1}, {"step": 2, "a": 1}, {"step": 2, "b": 1}]


def test_a_torn_last_line_goes(path: Path) -> None:
    log.append(path, *ROWS[:2])
    with path.open("a") as f:
        f.write('{"step": 2, "rew')
    log.truncate(path, 9)
    assert log.read(path) == ROWS[:2]


def test_a_log_that_is_not_there_is_not_made(path: Path) -> None:
    log.truncate(path, 3)
    assert not path.exists()


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_completion_may_hold_any_line_separator(path: Path, separator: str) -> None:
    rows = [{"step": 1, "text": f"one{separator}two"}, {"step": 2, "text": "three"}]
    log.append(path, *rows)
    log.truncate(path, 2)
    assert log.read(path) == rows


def test_a_text_that_is_half_a_character_is_logged_all_the_same(path: Path) -> None:
    log.append(path, {"step": 1, "text": "broken \N{REPLACEMENT CHARACTER} byte"})
    assert log.read(path)[0]["text"] == "broken \N{REPLACEMENT CHARACTER} byte"
