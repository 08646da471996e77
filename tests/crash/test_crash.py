"""The short form of `make torture`: the same code with a few points of each kind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def figures(tmp_path: Path, part: str, count: int) -> dict[str, Any]:
    """What `python -m tests.crash.torture` finds; a process of its own, because it forks."""
    file = tmp_path / "figures.json"
    command = ["-m", "tests.crash.torture", part, "--count", str(count), "--json", str(file)]
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert file.exists(), done.stderr
    found: dict[str, Any] = json.loads(file.read_text())[part]
    assert found["failures"] == []
    assert done.returncode == 0
    return found


def test_a_run_killed_anywhere_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    found = figures(tmp_path, "kill", 12)
    assert found["equal"] == found["points"] >= 12
    assert found["file_operations"] == 6


def test_a_run_with_tools_killed_anywhere_goes_on_too(tmp_path: Path) -> None:
    found = figures(tmp_path, "tools", 2)
    assert found["equal"] == found["points"] >= 2
    assert found["calls"] > 1


def test_a_disk_that_fails_costs_nothing_but_the_last_iterations(tmp_path: Path) -> None:
    assert figures(tmp_path, "faults", 6)["contained"] == 6


def test_damage_to_any_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    found = figures(tmp_path, "corruption", 120)
    assert found["detected"] == 120
    assert found["files"] >= 12


def test_a_run_that_is_told_to_stop_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert figures(tmp_path, "signals", 4)["resumed_equal"] == 4


def test_one_seed_gives_one_run_whatever_the_width(tmp_path: Path) -> None:
    assert figures(tmp_path, "determinism", 2)["distinct_hashes"] == 1


def test_a_value_that_is_not_finite_moves_no_weight(tmp_path: Path) -> None:
    found = figures(tmp_path, "nan", 4)
    assert found["weights_unchanged"] == found["injections"] >= 4


def test_a_long_run_does_not_grow(tmp_path: Path) -> None:
    found = figures(tmp_path, "soak", 80)
    assert found["descriptors"][0] == found["descriptors"][1]


def test_the_harness_sees_a_resume_that_forgets_something() -> None:
    script = (
        "import sys; from tests.crash import torture; from mlx_grpo.run import log\n"
        "log.cut = lambda path, size: None\n"  # rows after the checkpoint would stay
        "sys.argv = ['torture', 'kill', '--count', '6']; sys.exit(torture.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "metrics, completions differ" in done.stdout
