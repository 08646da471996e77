"""mlx-lm's own programs, as processes, on what a run and its exports leave."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load

from mlx_grpo.export.export import Export, export_run
from tests.helpers.paths import WITHOUT_TORCH

SECONDS = 120


def environment() -> dict[str, str]:
    """Of a process that finds no torch."""
    return {**os.environ, "PYTHONPATH": WITHOUT_TORCH}


def mlx_lm(program: str, *arguments: str | Path) -> str:
    """stdout of a program of mlx-lm."""
    command = [sys.executable, "-m", "mlx_lm", program, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(model: Path, *flags: str | Path) -> str:
    """A greedy answer of `mlx_lm.generate`."""
    return mlx_lm(
        *("generate", "--model", model, *flags, "--prompt", "say tea"),
        *("--temp", "0", "--max-tokens", "12", "--verbose", "False"),
    )


def test_generate_speaks_with_the_adapter_and_with_the_fused_model(
    finished_run: Path, tmp_path: Path
) -> None:
    sft = finished_run.parent / "sft-4bit"
    adapted = answer(sft, "--adapter-path", finished_run / "best")
    assert adapted.strip() and adapted != answer(sft)
    out = export_run(Export(finished_run, "dequantized", output=tmp_path / "wide", verify=False))
    assert answer(out.directory) == adapted


def test_fuse_takes_the_adapter(finished_run: Path, tmp_path: Path) -> None:
    sft = finished_run.parent / "sft-4bit"
    flags = ("--model", sft, "--adapter-path", finished_run / "best")
    mlx_lm("fuse", *flags, "--save-path", tmp_path / "fused")
    model, _ = load(str(tmp_path / "fused"))
    assert model.layers


@contextmanager
def serving(*flags: str | Path) -> Iterator[str]:
    """`mlx_lm.server` on a free port; yields its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", *map(str, flags), "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < end, "no server came up"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


def ask(address: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "say tea"}], "max_tokens": 12}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps({**body, "temperature": 0.0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return json.load(reply)


@pytest.mark.parametrize("form", ["run", "export"])
def test_server_answers_with_the_adapter(form: str, finished_run: Path, tmp_path: Path) -> None:
    sft, adapter = finished_run.parent / "sft-4bit", finished_run / "best"
    if form == "export":
        adapter = export_run(Export(finished_run, "adapter", output=tmp_path / "a")).directory
    with serving("--model", sft, "--adapter-path", adapter) as address:
        reply = ask(address)
    text = reply["choices"][0]["message"]["content"]
    assert text.strip() == answer(sft, "--adapter-path", finished_run / "best").strip()
