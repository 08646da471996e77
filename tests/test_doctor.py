"""The examination: what is found, what to type, and the exit code."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo import doctor
from mlx_grpo.cli import main
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.doctor import Check, examine
from mlx_grpo.doctor import matmul_gflops as measured
from tests.helpers.mixtures import mixture_config
from tests.helpers.tiny import write_model_of


@pytest.fixture
def weights(sft: Path, tmp_path: Path) -> Path:
    """A directory with a converted model."""
    convert_sft(locate(str(sft)), tmp_path / "w" / "sft-4bit", Quantization(4, 32), None)
    return tmp_path / "w"


@pytest.fixture(autouse=True)
def fast_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a fault, whatever the one that runs the tests has."""
    monkeypatch.setattr(doctor, "matmul_gflops", lambda _: 150.0)
    monkeypatch.setattr(doctor, "OPENBLAS", "libopenblas.so.0")
    monkeypatch.setattr(doctor, "on_linux_cpu", lambda: True)
    monkeypatch.setattr(doctor, "device_name", lambda: "cpu")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")


def found(weights: Path, subject: str) -> Check:
    return next(f for f in examine(weights) if f.subject == subject)


def command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "doctor", *flags])
    return main()


def test_a_sound_machine_has_no_problem(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--weights", str(weights)) == 0
    out, err = capsys.readouterr()
    assert "0 problems found" in out and not err
    assert f"mlx-lm             {version('mlx-lm')}" in out
    assert "sft-4bit" in out and "whole" in out


def test_a_model_that_is_not_there_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--model", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err.endswith("none: no such directory\n")


def test_the_list_of_findings_is_no_chatter_that_quiet_leaves_out(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--weights", str(weights), "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)


def test_a_damaged_weight_is_a_problem_and_the_exit_code_says_so(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = weights / "sft-4bit" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert command(monkeypatch, "--weights", str(weights)) == 1
    out, err = capsys.readouterr()
    assert "1 problem found" in out
    assert "model.safetensors: does not match manifest.json" in err and "; type: mlx-grpo" in err


def test_json_holds_the_same_findings(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--json", "--weights", str(weights)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["subject"] for r in rows} >= {"python", "mlx", "device", "memory", "disk"}
    assert all(r.keys() == {"level", "subject", "text", "remedy"} for r in rows)


def test_without_openblas_the_package_is_named(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "matmul_gflops", lambda _: 2.0)
    assert found(weights, "device").level == "note"  # loaded, but something else is slow
    monkeypatch.setattr(doctor, "OPENBLAS", None)
    finding = found(weights, "device")
    assert finding.level == "problem" and finding.remedy.endswith("libopenblas0-pthread")


def test_without_a_compiler_the_package_is_named(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert found(weights, "compiler").remedy == "apt-get install g++"
    monkeypatch.setattr(doctor, "on_linux_cpu", lambda: False)
    assert "compiler" not in {f.subject for f in examine(weights)}


def test_a_version_outside_the_range_is_a_problem(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda n: "0.1.0" if n == "mlx-lm" else real(n))
    finding = found(weights, "mlx-lm")
    assert finding.level == "problem" and finding.remedy.startswith("pip install 'mlx-lm")


def test_a_full_disk_and_a_model_beyond_the_gpu_are_problems(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert found(weights, "disk").level == "problem"
    monkeypatch.setattr(doctor, "device_name", lambda: "metal")
    monkeypatch.setattr(doctor, "gpu_working_set", lambda: 1000)
    finding = found(weights, str(weights / "sft-4bit"))
    assert finding.level == "problem" and "iogpu.wired_limit_mb=" in finding.remedy


def test_no_weights_yet_is_no_problem(tmp_path: Path) -> None:
    finding = found(tmp_path, "weights")
    assert finding.level == "note" and finding.remedy.startswith("mlx-grpo convert")


def test_the_speed_of_a_matmul_is_measured() -> None:
    assert measured(64) > 0


def test_a_model_that_trains_and_one_that_does_not_each_get_a_line(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixture = write_model_of(tmp_path / "mixture", mixture_config("qwen3_moe"))
    assert command(monkeypatch, "--model", str(mixture)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "qwen3_moe: trains, with a LoRA on 99% of the blocks' weights" in line
    assert line.endswith("experts at rank 2, 2 routers frozen")
    (mixture / "model.safetensors").unlink()
    assert command(monkeypatch, "--model", str(mixture)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"does not train: {mixture}: " in line and "safetensors" in line
