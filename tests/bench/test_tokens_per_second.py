"""The benchmark users run: whole, on a tiny shape, and its arithmetic."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "speed"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts in bench/ find each other as if run from the command line."""
    monkeypatch.syspath_prepend(str(BENCH))
    return BENCH


def test_it_writes_every_stage_of_every_number_of_rows(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    flags = ["--shape", "tiny", "--rows", "1", "12", "--prompt", "5", "--completion", "4"]
    monkeypatch.setattr(sys, "argv", ["tokens_per_second.py", *flags, "--json", str(out)])
    runpy.run_path(str(bench / "tokens_per_second.py"), run_name="__main__")
    found = json.loads(out.read_text())
    assert [r["rows"] for r in found["results"]] == [1, 12]
    for r in found["results"]:
        assert list(r["stages"]) == ["rollout", "reward", "log-prob", "update"]
        assert sum(s["share"] for s in r["stages"].values()) == pytest.approx(1)
        assert all(s["tokens_per_second"] > 0 for s in r["stages"].values())
    assert found["bytes_per_second"] > 0 and found["flops_per_second"] > 0
    printed = capsys.readouterr().out
    assert printed.count("rollout") == 2 and "GB/s" in printed


def test_rows_that_make_no_whole_groups_are_refused(
    bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tokens_per_second.py", "--shape", "tiny", "--rows", "7"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(bench / "tokens_per_second.py"), run_name="__main__")
    assert "multiple of 6" in capsys.readouterr().err
