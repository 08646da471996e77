"""Other trainers on the task of `time_to_reward.py`, each in an environment of its own."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers.common import measured
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.files.safetensors import load_arrays

PEERS = Path(__file__).parents[1] / "peers"
DONE = "done.json"


class Trainer(NamedTuple):
    """Another trainer with its settings."""

    script: str
    """In `bench/peers/`."""
    variant: str
    learning_rate: float


FASTEST = {
    "mlx-lm-lora": ("lm_lora.py", "fastest"),
    "unsloth": ("unsloth_zoo_mlx.py", "fastest"),
    "trl": ("trl_cpu.py", "default"),
}
"""Script and variant of each."""


def trained_by(trainer: Trainer, config: TrainConfig) -> list[float]:
    """Seconds of each iteration. The adapters are left in the run directory of `config`, whose
    seed, lengths and number of iterations are taken. What is done is not done again.

    Raises:
        InputError: it failed (where it says why), or the run there has other iterations.
    """
    run, iterations = config.run_directory, config.run.num_iterations
    if not (run / DONE).exists():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / DONE, _trained(trainer, config, run))
    seconds = list(read_json(run / DONE)["seconds"])
    if len(seconds) != iterations:
        raise InputError(f"{run}: has {len(seconds)} iterations; give another --output")
    return seconds


def _trained(trainer: Trainer, config: TrainConfig, run: Path) -> dict[str, Any]:
    given = {
        "variant": trainer.variant,
        "learn": run.resolve(),
        "every": config.run.checkpoint_every,
        "prompts": config.optimizer.minibatch_size,
        "iterations": config.run.num_iterations - 1,  # beside the first
        "tokens": config.rollout.max_completion_length,
        "seed": config.run.seed,
        "learning-rate": trainer.learning_rate,
    }
    flags = [text for flag, value in given.items() for text in (f"--{flag}", str(value))]
    subprocess.run([sys.executable, str(PEERS / "model.py")], check=True)  # if it is not there yet
    log = run / "log.txt"
    found = measured(PEERS / trainer.script, flags, log)
    if found is None:
        raise InputError(f"{trainer.script}: failed, see {log}")
    return found


def their_adapters(run: Path) -> Iterator[tuple[int, Parameters]]:
    """(iteration, adapter), as far as they were kept."""
    for file in sorted(run.glob("step-*.safetensors")):
        yield int(file.stem.removeprefix("step-")), load_arrays(file)
