"""What a rank says while MLX writes to the same standard error."""

import io
import json
import sys
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_grpo.console.output import Console
from mlx_grpo.distributed import launch
from mlx_grpo.distributed.heartbeat import Neighbour
from mlx_grpo.distributed.launch import launched

PIECE = "[ring] Socket "
"""What MLX has written of a line when another thread's turn comes."""


class Writes(io.RawIOBase):
    """Standard error, write by write, with a piece of MLX's line before each."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        text = bytes(data)  # type: ignore[call-overload]
        self.seen.append(text.decode())
        return len(text)

    @property
    def lines(self) -> list[str]:
        return PIECE.join(["", *self.seen]).splitlines()


def replaced(monkeypatch: pytest.MonkeyPatch) -> Writes:
    raw = Writes()
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)
    monkeypatch.setattr(sys, "stderr", text)
    return raw


def test_a_lost_rank_is_named_on_a_line_of_its_own_in_the_middle_of_one_of_mlx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writes = replaced(monkeypatch)
    (tmp_path / "hosts").write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    near, far = Pipe()
    monkeypatch.setattr(launch, "meet", lambda *_: [Neighbour(1, "mac-b", near)])
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    monkeypatch.setattr(launch, "_connect", lambda _: group)
    with pytest.raises(SystemExit), launched(Console()) as ranks:
        far.close()
        assert ranks.heartbeat
        ranks.heartbeat.explain(RuntimeError("a collective failed"))
    line = "error: rank 1 on mac-b: its process has ended; continue with --resume"
    assert writes.lines == [PIECE, line]


def test_alone_a_line_of_an_error_has_nothing_before_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launch.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    ui = Console()
    with launched(ui):
        ui.error("one line")
    assert capfd.readouterr().err == "error: one line\n"


def test_each_line_beside_another_library_is_a_single_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writes = replaced(monkeypatch)
    ui = Console()
    ui.share_errors()
    ui.warn("a")
    ui.error("b " * 300)
    assert writes.seen == ["\nwarning: a\n", f"\nerror: {('b ' * 300).strip()}\n"]
