"""SIGKILL anywhere, faults at every file operation, SIGTERM at any time; then --resume."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_grpo.cli import INTERRUPTED
from mlx_grpo.run import checkpoint
from mlx_grpo.run import directory as run_directory
from tests.crash import file_operations
from tests.crash.harness import (
    Child,
    World,
    contents,
    copy_run,
    finish,
    same,
    training,
    with_tools,
)

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES)


def uninterrupted(world: World, config: Path) -> tuple[dict[str, Any], float]:
    """What the run says that nothing interrupts, and its seconds."""
    finish(config, world.root / "warm-up")  # MLX compiles for the CPU on first use
    start = time.monotonic()
    finish(config, world.root / "whole")
    return contents(world.root / "whole"), time.monotonic() - start


def half_done(world: World, config: Path) -> Path:
    """A run killed after its checkpoint of iteration 2."""
    run = world.root / "half"
    shutil.rmtree(run, ignore_errors=True)
    child = Child(training(config, run), world.root / "half.txt")
    while not (run / "checkpoints" / "latest").exists():
        time.sleep(0.002)
    child.send(signal.SIGKILL)
    child.wait()
    return run


def operations_after(world: World, config: Path, half: Path) -> list[str]:
    """The file operations of a run from its checkpoint of iteration 2 to its end."""
    run, report = copy_run(half, world.root / "counted"), world.root / "operations.txt"
    names: list[str] = []

    def act() -> int | None:
        file_operations.install(0, file_operations.die, names.append)
        status = training(config, run)()
        file_operations.install(0, file_operations.die, lambda _: None)
        report.write_text(json.dumps(names))
        return status

    if status := Child(act, world.root / "counted.txt").wait():
        raise RuntimeError(f"exit status {status}")
    found: list[str] = json.loads(report.read_text())
    return found


def struck(
    world: World, config: Path, run: Path, at: int, strike: file_operations.Strike
) -> tuple[int, str]:
    """(exit status, output) of going on with a run that is struck at its `at`-th operation."""

    def act() -> int | None:
        file_operations.install(at, strike, lambda _: None)
        return training(config, run)()

    output = world.root / "struck.txt"
    return Child(act, output).wait(), output.read_text()


def kill_matrix(world: World, count: int, rng: random.Random, **changes: Any) -> dict[str, Any]:
    """Kill at every file operation, or a sample of half of `count`; the rest at random times.

    Args:
        changes: of the run's settings.
    """
    config = world.config(**changes)
    whole, seconds = uninterrupted(world, config)
    half = half_done(world, config)
    names = operations_after(world, config, half)
    points = range(1, len(names) + 1)
    if len(names) > count // 2 and count < 100:
        points = sorted(rng.sample(points, count // 2))  # type: ignore[assignment]
    failures: list[str] = []
    stages: Counter[str] = Counter()
    for at in points:
        run = copy_run(half, world.root / "killed")
        status, _ = struck(world, config, run, at, file_operations.die)
        stages[f"system call: {names[at - 1]}"] += 1
        if status != -signal.SIGKILL:
            failures.append(f"operation {at} ({names[at - 1]}): exit status {status}")
        failures += _resumed(config, run, whole, f"operation {at} ({names[at - 1]})")
    for number in range(max(0, count - len(points))):
        run = world.root / "killed"
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(1 + number % 2):  # every other run dies twice
            child = Child(training(config, run), world.root / "killed.txt")
            time.sleep(rng.uniform(0, seconds))
            stages[f"stage: {child.send(signal.SIGKILL)}"] += 1
            child.wait()
        failures += _resumed(config, run, whole, f"random time {number}")
    done = sum(stages.values())
    return {
        "points": done,
        "equal": done - len(failures),
        "file_operations": len(points),
        "where": dict(sorted(stages.items())),
        "failures": failures,
    }


def kill_with_tools(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """`kill_matrix` of a run whose completions are sampled in turns, with an environment."""
    found = kill_matrix(world, count, rng, **with_tools(world))
    rows = contents(world.root / "whole")["metrics"]
    found["calls"] = sum(row.get("tools/call_frequency", 0) for row in rows)
    return found


def _resumed(config: Path, run: Path, whole: dict[str, Any], point: str) -> list[str]:
    try:
        finish(config, run)
    except RuntimeError as e:
        return [f"{point}: {e}"]
    return [f"{point}: {difference} differ"] if (difference := same(run, whole)) else []


def fault_matrix(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """Fail every file operation with each errno; or a sample of `count`, 0 for all."""
    config = world.config()
    whole, _ = uninterrupted(world, config)
    half = half_done(world, config)
    names = operations_after(world, config, half)
    points = [(at, number) for at in range(1, len(names) + 1) for number in ERRNOS]
    if count and count < len(points):
        points = sorted(rng.sample(points, count))
    failures: list[str] = []
    for index, (at, number) in enumerate(points):
        run = copy_run(half, world.root / "failed")
        strike = file_operations.fail_with(number)
        status, said = struck(world, config, run, at, strike)
        point = f"operation {at} ({names[at - 1]}), {errno.errorcode[number]}"
        failures += [f"{point}: {p}: {said}" for p in _complaint(status, said, number)]
        failures += [f"{point}: {p}" for p in _still_loads(world, run)]
        if index % 8 == 0:
            failures += _resumed(config, run, whole, point)
    return {"faults": len(points), "contained": len(points) - len(failures), "failures": failures}


def _complaint(status: int, said: str, number: int) -> list[str]:
    """What is wrong with the end of a run whose disk failed; one that only cleaned up goes on."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status == 0:
        return [] if not errors else ["an error, but exit status 0"]
    told = len(errors) == 1 and os.strerror(number) in errors[0]
    return [
        complaint
        for complaint, wrong in (
            (f"exit status {status}", status != 2),
            ("a traceback", "Traceback" in said),
            ("not one line with the reason", not told),
            ("no way to go on", "--resume" not in said and "done: " not in said),
        )
        if wrong
    ]


def _still_loads(world: World, run: Path) -> list[str]:
    def act() -> None:
        found, skipped = checkpoint.load_newest(run / run_directory.CHECKPOINTS)
        if found.iteration < 2 or skipped:
            raise RuntimeError(f"iteration {found.iteration}, {skipped}")

    output = world.root / "loads.txt"
    return [output.read_text()] if Child(act, output).wait() else []


def signals(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """SIGTERM at random times after loading: seconds to exit, and whether it can be resumed."""
    config = world.config()
    whole, seconds = uninterrupted(world, config)
    latencies: list[float] = []
    failures: list[str] = []
    stages: Counter[str] = Counter()
    while len(latencies) < count:
        run = world.root / "stopped"
        shutil.rmtree(run, ignore_errors=True)
        output = world.root / "stopped.txt"
        child = Child(training(config, run), output)
        while not child.stage[0]:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.8 * seconds))
        start = time.monotonic()
        stage = child.send(signal.SIGTERM)
        status = child.wait()
        seconds_to_exit = time.monotonic() - start
        if "done: " in output.read_text():
            continue
        stages[stage] += 1
        latencies.append(seconds_to_exit)
        if status != INTERRUPTED:
            failures.append(f"exit status {status} during {stage}: {output.read_text()}")
        failures += _resumed(config, run, whole, f"SIGTERM during {stage}")
    latencies.sort()
    return {
        "runs": count,
        "resumed_equal": count - len(failures),
        "p50_seconds": round(latencies[len(latencies) // 2], 4),
        "p99_seconds": round(latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))], 4),
        "where": dict(sorted(stages.items())),
        "failures": failures,
    }
