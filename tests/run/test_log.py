"""A log is whole lines: appended, cut back on resume, never otherwise rewritten."""

from pathlib import Path

import pytest

from mlx_grpo.run import log

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


def test_cutting_brings_back_what_was_there(path: Path) -> None:
    log.append(path, *ROWS[:3])
    size = log.sizes(path.parent)[log.METRICS]
    log.append(path, *ROWS[3:])
    with path.open("a") as f:
        f.write('{"step": 2, "rew')  # torn
    log.cut(path, size)
    assert log.read(path) == ROWS[:3]
    assert [p.name for p in path.parent.iterdir()] == [log.METRICS]


def test_cutting_to_nothing_removes_the_file(path: Path) -> None:
    log.append(path, ROWS[0])
    log.cut(path, 0)
    assert not path.exists()


def test_a_log_that_is_shorter_or_missing_is_left_alone(path: Path) -> None:
    log.cut(path, 10)
    assert not path.exists()
    log.append(path, ROWS[0])
    log.cut(path, 10_000)
    assert log.read(path) == ROWS[:1]
    log.flush(path.parent)
    assert log.sizes(path.parent) == dict.fromkeys(log.LOGS, 0) | {log.METRICS: path.stat().st_size}


def test_numbers_without_a_name_in_json_become_null(path: Path) -> None:
    log.append(path, {"step": 1, "kl": float("nan"), "loss": float("-inf"), "reward": 0.5})
    assert log.read(path) == [{"step": 1, "kl": None, "loss": None, "reward": 0.5}]


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_completion_may_hold_any_line_separator(path: Path, separator: str) -> None:
    rows = [{"step": 1, "text": f"one{separator}two"}, {"step": 2, "text": "three"}]
    log.append(path, *rows)
    assert log.read(path) == rows


def test_a_text_that_is_half_a_character_is_logged_all_the_same(path: Path) -> None:
    log.append(path, {"step": 1, "text": "broken \N{REPLACEMENT CHARACTER} byte"})
    assert log.read(path)[0]["text"] == "broken \N{REPLACEMENT CHARACTER} byte"
