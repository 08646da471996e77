"""Run the real command in forked children of a process that has imported everything and computed
nothing: a start costs milliseconds, and a child may be killed anywhere."""

from tests.crash import without_torch  # noqa: F401  isort: skip
import mlx_grpo  # noqa: F401  isort: skip  (before MLX: it loads OpenBLAS)

import json
import mmap
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers.models.auto.tokenization_auto
import transformers.models.llama.configuration_llama  # noqa: F401

from mlx_grpo import cli
from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import to_toml
from mlx_grpo.grpo import metrics
from mlx_grpo.run import checkpoint, log
from mlx_grpo.run import directory as run_directory
from mlx_grpo.training import loop as trainer  # noqa: F401
from tests import conftest
from tests.helpers.tiny import write_acting_model

ENVIRONMENTS = Path(__file__).parents[1] / "helpers" / "environments.py"
STAGES = ("loading", "rollout", "reward", "logprob", "update", "evaluate", "saving", "between")
ITERATIONS = 6
Action = Callable[[], int | None]


@dataclass(frozen=True)
class World:
    """A tiny model, a reward model and prompts, in a directory."""

    root: Path

    def config(self, **changes: Any) -> Path:
        """A configuration file of a run that takes less than a second."""
        fields = {
            "actor_model": str(self.root / "sft"),
            "rm_model": str(self.root / "rm"),
            "prompts": str(self.root / "train.jsonl"),
            "eval_prompts": str(self.root / "eval.jsonl"),
            "num_iterations": ITERATIONS,
            "batch_size": 4,
            "minibatch_size": 2,
            "K": 3,
            "max_completion_length": 8,
            "lora_rank": 2,
            "learning_rate": 1e-2,
            "eval_every": 3,
            "checkpoint_every": 2,
            "keep": 2,
            "kl_targets": (0.5, 0.2),
        }
        file = self.root / f"config-{abs(hash(tuple(sorted(changes.items()))))}.toml"
        file.write_text(to_toml(train_config(**{**fields, **changes})))
        return file


def with_tools(world: World) -> dict[str, Any]:
    """Settings of a run whose completions are sampled in turns, with an environment."""
    return {
        "actor_model": str(world.root / "acting"),
        "rm_model": "none",
        "environment": f"{ENVIRONMENTS}:Adder",
        "max_tool_calling_iterations": 2,
        "max_prompt_length": 1000,
        "max_completion_length": 140,
    }


def make_world(root: Path) -> World:
    """Make it in a child, so that this process never touches MLX."""

    def make() -> None:
        from mlx_grpo.config.settings import RewardTrainConfig
        from mlx_grpo.files.manifest import write_manifest
        from mlx_grpo.reward_modeling.train import train_rm

        write_acting_model(root / "acting")
        sft = conftest.write_model(root / "sft")
        write_manifest(sft)
        subjects = ["tea", "rain", "bees", "snow", "figs", "moss", "owls", "salt"]
        rows = [{"id": s, "prompt": f"say {s}"} for s in subjects]
        conftest.write_jsonl(root / "train.jsonl", rows)
        held_out = [{"id": s, "prompt": f"why {s}?", "response": f"{s}."} for s in subjects[:2]]
        conftest.write_jsonl(root / "eval.jsonl", held_out)
        pairs = [
            {"prompt": f"say {i}", "chosen": "yes " * (1 + i % 2), "rejected": f"no {i}"}
            for i in range(8)
        ]
        conftest.write_jsonl(root / "pairs.jsonl", pairs)
        train_rm(
            RewardTrainConfig(
                model=str(sft),
                pairs=str(root / "pairs.jsonl"),
                output=str(root / "rm"),
                lora_rank=2,
                learning_rate=1e-2,
            )
        )

    root.mkdir(parents=True, exist_ok=True)
    status = Child(make, root / "make.txt").wait()
    if status:
        raise RuntimeError((root / "make.txt").read_text())
    return World(root)


class Child:
    """A forked child that runs an action and exits with what it returns."""

    def __init__(self, action: Action, output: Path):
        self.started = time.monotonic()
        self.output = output
        self.stage = mmap.mmap(-1, 1)
        """Index into STAGES, kept up to date by the child."""
        self.pid = os.fork()
        if not self.pid:
            self._run(action)

    def _run(self, action: Action) -> None:
        status = 70
        try:
            file = os.open(self.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            self._watch_stages()
            status = action() or 0
        except BaseException:  # whatever it is belongs into the output
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _watch_stages(self) -> None:
        def entering(stage: str) -> None:
            self.stage[0] = STAGES.index(stage)

        real_stage, real_save = metrics.Clock.stage, checkpoint.save

        @contextmanager
        def stage(clock: metrics.Clock, name: str) -> Iterator[None]:
            entering(name)
            with real_stage(clock, name):
                yield
            entering("between")

        def save(*arguments: Any) -> Path:
            entering("saving")
            path = real_save(*arguments)
            entering("between")
            return path

        metrics.Clock.stage = stage  # type: ignore[method-assign, assignment]
        checkpoint.save = save

    def send(self, number: int) -> str:
        """Send a signal; the stage it met."""
        met = STAGES[self.stage[0]]
        os.kill(self.pid, number)
        return met

    def wait(self) -> int:
        """Exit status; the negated signal that killed it."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def training(config: Path, run: Path, *more: str) -> Action:
    """`mlx-grpo train`, with --resume where there is a run."""

    def act() -> int:
        resume = ["--resume"] if run_directory.is_run(run) else []
        files = ["--config", str(config), "--output", str(run)]
        sys.argv = ["mlx-grpo", "train", *files, *resume, *more]
        return cli.main()

    return act


def finish(config: Path, run: Path) -> None:
    """Go on until the run is done.

    Raises:
        RuntimeError: it does not end well; with all it said.
    """
    output = run.with_suffix(".txt")
    if status := Child(training(config, run), output).wait():
        raise RuntimeError(f"exit status {status}: {output.read_text()}")


def contents(run: Path) -> dict[str, Any]:
    """All that a finished run says, but for times, memory, and its own place."""
    last = run / "checkpoints" / f"step-{ITERATIONS:06d}"
    state = json.loads((last / "state.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del state["logs"], state["config"]["output"]  # sizes follow the digits of times
    arrays = {p.name: p.read_bytes() for p in sorted(last.glob("*.safetensors"))}
    adapters = {p.parent.name: p.read_bytes() for p in sorted(run.glob("*/adapters.safetensors"))}
    return {
        "arrays": arrays,
        "adapters": adapters,
        "state": state,
        "metrics": [log.repeatable(row) for row in rows],
        "completions": (run / "completions.jsonl").read_bytes(),
        "held-out completions": (run / "eval_completions.jsonl").read_bytes(),
        "entries": sorted(p.name for p in run.iterdir()),
        "debris": sorted(p.name for p in (run / "checkpoints").glob(".*")),
    }


def same(run: Path, whole: dict[str, Any]) -> str:
    """What differs, or nothing."""
    found = contents(run)
    return ", ".join(part for part in whole if found[part] != whole[part])


def copy_run(source: Path, target: Path) -> Path:
    """A run to spoil."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def kill(child: Child) -> tuple[str, int]:
    """End a child as kill -9 does: (stage it met, exit status)."""
    stage = child.send(signal.SIGKILL)
    return stage, child.wait()
