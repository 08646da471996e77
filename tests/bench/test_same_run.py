"""The comparison of two runs sees a changed digit, a lost line and other weights."""

import json
from pathlib import Path

import pytest

from bench.learning import same_run


def written(run: Path, weights: bytes, *rewards: float) -> Path:
    checkpoint = run / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter.safetensors").write_bytes(weights)
    lines = [
        json.dumps({"step": i, "reward": r, "time/iteration": hash(run)}) + "\n"
        for i, r in enumerate(rewards, 1)
    ]
    for table in same_run.TABLES:
        (run / table).write_text("".join(lines))
    return run


@pytest.mark.parametrize(
    ("weights", "rewards", "status"),
    [
        (b"a", (0.1, 0.2), 0),
        (b"a", (0.1, 0.2, 0.9), 0),  # what comes later does not count
        (b"a", (0.1, 0.3), 1),
        (b"a", (0.1,), 1),
        (b"b", (0.1, 0.2), 1),
    ],
)
def test_runs_that_differ_are_told(
    weights: bytes,
    rewards: tuple[float, ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = written(tmp_path / "one", b"a", 0.1, 0.2, 0.3)
    other = written(tmp_path / "other", weights, *rewards)
    monkeypatch.setattr("sys.argv", ["same_run", str(one), str(other), "--at", "2"])
    assert same_run.main() == status


def test_a_checkpoint_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = written(tmp_path / "one", b"a", 0.1)
    monkeypatch.setattr("sys.argv", ["same_run", str(one), str(one), "--at", "3"])
    assert same_run.main() == 2
