"""What several ranks cost and keep, on loopback and tiny models (one BLAS thread a rank):

- `same`: 2 and 3 ranks against 1 after 20 iterations: relative difference of the adapters, and
  whether the samples of the first iteration, and of all, are the same;
- `kill`: one rank is killed at random times after loading: seconds until the others have ended,
  whether one line names the rank, and whether the resumed run is the uninterrupted one bit for bit;
- `stop`: one rank is told to stop, and the run goes on with another number of ranks;
- `speed`: iterations per second of 2 ranks against 1.

usage: OPENBLAS_NUM_THREADS=1 python -m bench.speed.ranks [same stop kill speed] [--json FILE]
       OPENBLAS_NUM_THREADS=1 python -m bench.speed.ranks launcher --model weights/sft-4bit

`launcher`, on an idle machine of two cores: seconds of an iteration of a real model on one rank, on
two ranks that are started without `mlx.launch`, and on two under it.
"""

from tests.crash import without_torch  # noqa: F401  isort: skip
import mlx_grpo  # noqa: F401  isort: skip  (before MLX: it loads OpenBLAS)

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mlx_grpo.console.output import Console
from mlx_grpo.distributed import launch  # noqa: F401  (imported before the forks)
from mlx_grpo.run import log
from mlx_grpo.training import loop  # noqa: F401  (imported before the forks)
from tests.crash.harness import ITERATIONS, Child, World, make_world, training, with_tools
from tests.helpers.ports import free_ports

SECONDS = ("time/iteration", "time/evaluate")
LONGEST = 30.0
"""Seconds within which the others must have ended."""


def start(config: Path, run: Path, size: int, *more: str) -> list[Child]:
    """`mlx-grpo train` in some ranks, as `mlx.launch --backend ring` starts them."""
    hosts = run.with_suffix(".hosts")
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    act = training(config, run, *more)

    def ranked(rank: int) -> int:
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts))
        return act() or 0

    return [
        Child(lambda rank=rank: ranked(rank), run.with_suffix(f".{rank}.txt"))  # type: ignore[misc]
        for rank in range(size)
    ]


def train(config: Path, run: Path, size: int, *more: str) -> Path:
    """To the end.

    Raises:
        RuntimeError: a rank does not end well; with what all said.
    """
    children = start(config, run, size, *more)
    statuses = [child.wait() for child in children]
    if any(statuses):
        raise RuntimeError("\n".join(child.output.read_text() for child in children))
    return run


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Of a log, without times and memory."""
    return [log.repeatable(row) for row in log.read(run / name)]


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "final" / "adapters.safetensors")


def apart(one: Path, other: Path) -> float:
    """Norm of the difference of two adapters over the norm of the first."""
    a, b = (
        np.concatenate([v.ravel() for _, v in sorted(adapter(r).items())]) for r in (one, other)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def same(world: World, iterations: int, ui: Console) -> dict[str, Any]:
    """2 and 3 ranks against 1: with uneven shares, with fewer prompts than ranks, with tools."""
    found: dict[str, Any] = {}
    for name, settings in {
        "5 prompts, minibatches of 2": {"batch_size": 5, "minibatch_size": 2},
        "2 prompts, 2 epochs": {"batch_size": 2, "minibatch_size": 1, "epochs": 2},
        "3 prompts, tools": {"batch_size": 3, "minibatch_size": 1, **with_tools(world)},
    }.items():
        every = {"checkpoint_every": iterations, "eval_every": iterations}
        config = world.config(num_iterations=iterations, **every, **settings)
        runs = [train(config, world.root / f"same-{len(found)}-{n}", n) for n in (1, 2, 3)]
        samples = [log.read(run / log.COMPLETIONS) for run in runs]
        first = [[row for row in answers if row["step"] == 1] for answers in samples]
        found[name] = {
            "relative_difference": {n: apart(runs[0], runs[n - 1]) for n in (2, 3)},
            "first_samples_equal": first[0] == first[1] == first[2],
            "all_texts_equal": _texts(runs[0]) == _texts(runs[1]) == _texts(runs[2]),
        }
        ui.say(f"{name}: {json.dumps(found[name])}")
    return found


def stop(world: World, ui: Console) -> dict[str, Any]:
    """Tell the last of 2 ranks to stop, go on with 3, and compare with 1."""
    config, run = world.config(), world.root / "stopped"
    whole = train(config, world.root / "never-stopped", 1)
    children = start(config, run, 2)
    while not (run / log.COMPLETIONS).exists():
        time.sleep(0.001)
    children[1].send(signal.SIGTERM)
    statuses = [child.wait() for child in children]
    train(config, run, 3)
    found = {
        "statuses": statuses,
        "relative_difference": apart(whole, run),
        "samples_equal": _texts(whole) == _texts(run),
    }
    ui.say(f"stop: {json.dumps(found)}")
    return found


def _texts(run: Path) -> list[str]:
    return [row["completion"] for row in log.read(run / log.COMPLETIONS)]


def kill(world: World, count: int, ui: Console) -> dict[str, Any]:
    """Kill one of 2 or 3 ranks at a random time; resume with as many."""
    rng, config = random.Random(9), world.config()
    whole, seconds = {}, {}
    for size in (2, 3):
        whole[size] = train(config, world.root / f"whole-{size}", size)
        seconds[size] = _seconds(whole[size])
    kills: list[dict[str, Any]] = []
    while len(kills) < count:
        size = 2 + len(kills) % 2
        killed = _killed(config, world.root / "killed", size, rng.uniform(0, seconds[size]), rng)
        if killed is None:
            continue
        run = train(config, world.root / "killed", size)
        logs = all(rows(run, n) == rows(whole[size], n) for n in log.LOGS[:3])
        killed["equal"] = logs and apart(whole[size], run) == 0.0
        kills.append(killed)
        ui.say(f"{len(kills)}: {json.dumps(killed)}")
    return {
        "kills": len(kills),
        "others_ended_within_30_s": sum(k["seconds"] < LONGEST for k in kills),
        "slowest_seconds": max(k["seconds"] for k in kills),
        "one_line_names_the_rank": sum(k["named"] for k in kills),
        "resumed_equal": sum(k["equal"] for k in kills),
        "each": kills,
    }


def _seconds(run: Path) -> float:
    """Of all stages of a run."""
    figures = log.read(run / log.METRICS)
    return sum(v for row in figures for k, v in row.items() if k in SECONDS)


def _killed(
    config: Path, run: Path, size: int, after: float, rng: random.Random
) -> dict[str, Any] | None:
    """One kill, and how the others ended; None if the rank had ended by then, or if
    the others had no more to wait for."""
    shutil.rmtree(run, ignore_errors=True)
    children, dead = start(config, run, size), rng.randrange(size)
    while not children[0].stage[0]:
        time.sleep(0.001)
    time.sleep(after)
    stage = children[dead].send(signal.SIGKILL)
    begun = time.monotonic()
    statuses = [child.wait() for child in children]
    seconds = time.monotonic() - begun
    others = [status for rank, status in enumerate(statuses) if rank != dead]
    last = f"{ITERATIONS}/{ITERATIONS}  reward" in children[0].output.read_text()
    if statuses[dead] == 0 or (last and not any(others)):
        return None
    said = [child.output.read_text() for child in children]
    errors = re.findall(r"^error: .*", "\n".join(said), re.MULTILINE)
    named = [e.startswith(f"error: rank {dead} on ") for e in errors] == [True]
    return {
        "rank": dead,
        "of": size,
        "stage": stage,
        "seconds": round(seconds, 2),
        "named": named,
        "statuses": statuses,
        **({} if named else {"said": said}),
    }


def speed(world: World, ui: Console) -> dict[str, Any]:
    """Longer answers and more of them, so that there is something to share."""
    work = {"batch_size": 8, "minibatch_size": 4, "K": 8, "max_completion_length": 128}
    work |= {"update_rows": 0, "kl_share": 1}
    config = world.config(num_iterations=8, checkpoint_every=100, eval_every=100, **work)
    per_second = {}
    for size in (1, 2):
        run = train(config, world.root / f"speed-{size}", size)
        times = [row["time/iteration"] for row in log.read(run / log.METRICS) if "kl" in row][1:]
        per_second[size] = len(times) / sum(times)
    efficiency = per_second[2] / (2 * per_second[1])
    found = {"iterations_per_second": per_second, "efficiency": efficiency}
    ui.say(f"speed: {json.dumps(found)}")
    return found


def launcher(model: Path, place: Path, ui: Console) -> dict[str, Any]:
    """A real model on one rank and on two, started by hand and by MLX's launcher."""
    own = [sys.executable, "-m", "mlx_grpo", "train"]
    flags = {
        **{"actor-model": model, "rm-model": "none", "reward": "mlx_grpo.rubric:gold"},
        **{"prompts": "data/rl_prompts.jsonl", "eval-prompts": "data/eval_prompts.jsonl"},
        **{"num-iterations": 4, "batch-size": 4, "minibatch-size": 4, "K": 6, "eval-limit": 1},
        **{"update-rows": 0, "kl-share": 1},
        **{"max-completion-length": 48, "eval-every": 100, "checkpoint-every": 100},
    }
    command = [*own, *(f"--{name}={value}" for name, value in flags.items()), "--quiet"]
    hosts = place / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    by_hand = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(2)]
    under = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring"]
    ways = {
        "1 rank": [(command, {})],
        "2 ranks": [(command, environment) for environment in by_hand],
        "2 ranks under mlx.launch": [([*under, "--", *command], {})],
    }
    found = {}
    for name, processes in ways.items():
        run = place / name.replace(" ", "-")
        started = [
            subprocess.Popen([*c, f"--output={run}"], env={**os.environ, **e}) for c, e in processes
        ]
        statuses = [process.wait() for process in started]
        if any(statuses):
            raise RuntimeError(f"{name}: did not end well")
        times = [row["time/iteration"] for row in log.read(run / log.METRICS) if "kl" in row][1:]
        found[name] = {"median_seconds": statistics.median(times), "seconds": times}
        ui.say(f"{name}: {json.dumps(found[name])}")
    alone = found["1 rank"]["median_seconds"]
    for name in list(found)[1:]:
        found[name]["times_as_fast"] = alone / found[name]["median_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=["same", "stop", "kill", "speed"])
    parser.add_argument("--iterations", type=int, default=20, help="of `same`")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", type=Path, default=Path("weights/sft-4bit"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ui, found = Console(), {}
    with tempfile.TemporaryDirectory() as place:
        world = make_world(Path(place))
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "same": lambda: same(world, args.iterations, ui),
            "stop": lambda: stop(world, ui),
            "kill": lambda: kill(world, args.kills, ui),
            "speed": lambda: speed(world, ui),
            "launcher": lambda: launcher(args.model, Path(place), ui),
        }
        for part in args.parts:
            found[part] = measures[part]()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
