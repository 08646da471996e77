"""Fixtures: models, files and runs that many tests share."""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.models.backbone import Backbone, load_backbone
from tests.helpers.paths import ROOT
from tests.helpers.tiny import write_jsonl, write_model

# Exactness is a promise of the CPU in fp32. `make test-gpu` takes the device that MLX finds.
if os.environ.get("MLX_GRPO_TEST_DEVICE") != "any":
    mx.set_default_device(mx.cpu)

# What a test prints, sorts or finds must not depend on who runs it and where.
ENVIRONMENT = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
UNSET = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "LANGUAGE")
FREE_TO_SKIP = "this backend"
"""How the reason of a skip begins that no missing program is to blame for."""


def pytest_configure() -> None:
    os.environ.update(ENVIRONMENT)
    for name in UNSET:
        os.environ.pop(name, None)
    time.tzset()


@pytest.fixture(autouse=True)
def at_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts in the checkout, with a home directory of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


def _not_skipped_in_ci(report: Any) -> Any:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if os.environ.get("CI") == "true" and report.skipped and FREE_TO_SKIP not in reason:
        report.outcome, report.longrepr = "failed", f"skipped under CI=true: {reason}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line for each test in the file that `MLX_GRPO_TEST_LOG` names: what a run shows that had to
    be stopped."""
    log = os.environ.get("MLX_GRPO_TEST_LOG")
    on_worker = "PYTEST_XDIST_WORKER" in os.environ  # the process in charge sees its reports too
    ended = report.when == "call" or report.failed or report.skipped
    if log and not on_worker and ended:
        why = report.longreprtext[-2000:] if report.failed else ""
        line = {"test": report.nodeid, "outcome": report.outcome, "why": why}
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _not_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _not_skipped_in_ci((yield))


@pytest.fixture(scope="session")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny llama with byte tokenizer."""
    return write_model(tmp_path_factory.mktemp("models") / "sft")


@pytest.fixture(scope="session")
def backbone(sft: Path) -> Backbone:
    """The tiny llama, loaded."""
    return load_backbone(sft)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training prompts, held-out prompts)."""
    directory = tmp_path_factory.mktemp("prompts")
    subjects = ["tea", "rain", "bees", "snow", "figs", "moss", "owls", "salt"]
    train = [{"id": s, "prompt": f"say {s}"} for s in subjects]
    held_out = [{"id": s, "prompt": f"why {s}?", "response": f"{s} is."} for s in subjects[:3]]
    return (
        write_jsonl(directory / "train.jsonl", train),
        write_jsonl(directory / "eval.jsonl", held_out),
    )


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight preference pairs."""
    rows = [
        {"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": f"no {7 * i} or not"}
        for i in range(8)
    ]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def reward_model(sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward adapter for the tiny llama, trained for a few steps."""
    from mlx_grpo.config.settings import RewardTrainConfig
    from mlx_grpo.reward_modeling.train import train_rm

    directory = tmp_path_factory.mktemp("rm")
    rows = [
        {"prompt": f"say {i}", "chosen": "yes " * (1 + i % 2), "rejected": f"no {i}"}
        for i in range(8)
    ]
    pairs = write_jsonl(directory / "pairs.jsonl", rows)
    out = directory / "rm"
    train_rm(
        RewardTrainConfig(
            model=str(sft), pairs=str(pairs), output=str(out), lora_rank=2, learning_rate=1e-2
        )
    )
    return out


@pytest.fixture(scope="session")
def run_settings(sft: Path, reward_model: Path, prompt_files: tuple[Path, Path]) -> dict[str, Any]:
    """Fields of a TrainConfig that runs in a second, but for its place."""
    return {
        "actor_model": str(sft),
        "rm_model": str(reward_model),
        "prompts": str(prompt_files[0]),
        "eval_prompts": str(prompt_files[1]),
        "num_iterations": 4,
        "batch_size": 4,
        "minibatch_size": 2,
        "K": 3,
        "max_completion_length": 8,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "kl_targets": (0.5, 0.2),
    }


@pytest.fixture
def train_arguments(run_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Fields of a TrainConfig that runs in a second."""
    return {**run_settings, "output": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def finished_run(
    sft: Path, prompt_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of two iterations on a 4-bit model, the reward a function."""
    from mlx_grpo.config.settings import train_config
    from mlx_grpo.console.output import Console
    from mlx_grpo.convert.convert import convert_sft
    from mlx_grpo.convert.quantize import Quantization
    from mlx_grpo.convert.source import locate
    from mlx_grpo.training.loop import train

    root = tmp_path_factory.mktemp("run")
    convert_sft(locate(str(sft)), root / "sft-4bit", Quantization(4, 32), None)
    (root / "rewards.py").write_text(
        "def short(completions): return [-len(c) for c in completions]"
    )
    config = train_config(
        actor_model=str(root / "sft-4bit"),
        rm_model="none",
        reward=(f"{root / 'rewards.py'}:short",),
        prompts=str(prompt_files[0]),
        eval_prompts=str(prompt_files[1]),
        output=str(root / "run"),
        num_iterations=2,
        batch_size=4,
        minibatch_size=2,
        K=3,
        max_completion_length=8,
        lora_rank=4,
        learning_rate=3e-2,
        kl_targets=(5.0,),
        eval_every=1,
    )
    assert train(config, Console(quiet=True))
    assert (root / "run" / "best").is_dir()
    return root / "run"


@pytest.fixture(scope="session")
def whole_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an undamaged source of each kind."""
    from tests.helpers import sources
    from tests.helpers.gguf_writer import write_tiny

    root = tmp_path_factory.mktemp("whole")
    causal = sources.causal(root / "sft", "llama", tie_word_embeddings=False)
    for name in ("sharded", "bin", "base"):
        shutil.copytree(root / "sft", root / name)
    sources.reshard(causal, root / "sharded")
    sources.pickle(root / "bin")
    model = sources.classifier(root / "rm", "llama")
    sources.peft_adapter(root / "peft", root / "base", causal, task_type="CAUSAL_LM")
    sources.peft_adapter(root / "rm-peft", root / "base", model, task_type="SEQ_CLS")
    (root / "gguf").mkdir()
    write_tiny(root / "gguf" / "m.gguf", "F32")
    return root


@pytest.fixture(scope="session")
def damage_tally() -> Iterator[Counter[str]]:
    """Counts outcomes and prints them in the end."""
    counts: Counter[str] = Counter()
    yield counts
    print(
        f"\n{counts['refused']} damaged sources refused in one line, "
        f"{counts['unseen']} flips that no reader can see, "
        f"{counts['harmless']} fields of a wrong type without effect"
    )


@pytest.fixture
def convert_damaged(
    tmp_path: Path,
    damage_tally: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str | None]:
    """The command on a source of some kind: what it says after the source's path, or None where it
    wrote a complete directory, to be counted as `accepted`."""

    from mlx_grpo.cli import main
    from mlx_grpo.models.reward_model import load_reward_model

    def run(kind: str, source: Path, accepted: str = "unseen") -> str | None:
        role, place = ("rm" if kind.startswith("rm") else "sft"), source
        if kind == "gguf":
            place = source / "m.gguf"
        flags = ["--no-verify", "--group-size", "32", "--output", str(tmp_path / "w")]
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", "convert", f"--{role}", str(place), *flags])
        capsys.readouterr()
        code = main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        if code == 0:
            damage_tally[accepted] += 1
            written = tmp_path / "w" / f"{role}-4bit"
            backbone = load_backbone(written)
            if role == "rm":
                load_reward_model(written, backbone)
            shutil.rmtree(tmp_path / "w")
            return None
        lines = err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), err
        assert lines[0].startswith(f"error: {source}"), lines[0]
        assert not (tmp_path / "w").exists()
        damage_tally["refused"] += 1
        return lines[0].removeprefix(f"error: {source}")

    return run


@pytest.fixture
def source_copy(whole_sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of a source, to be damaged."""

    def fresh(kind: str) -> Path:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        return Path(shutil.copytree(whole_sources / kind, tmp_path / "source"))

    return fresh
