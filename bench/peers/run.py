"""Run every peer in turn with mlx-grpo and print the ratios.

usage: python bench/peers/run.py [--only NAME ...] [--again | --more] [--output FILE]

About twenty minutes on two cores the first time, installations included. A job that is done is kept
under `.cache/peers/results/` and not run again without --again (after a change of mlx-grpo:
`--again --only mlx-grpo`); one that fails is reported and the others go on. Run it with nothing
else at work; where a machine is never quite at rest, --more takes another turn and keeps the faster
of each job.

Whole iterations: the peers take one prompt an iteration at each of their settings, and four at the
fastest. mlx-grpo takes four with everything computed, and its own six with the defaults, which
learn from three of six completions. The ratios are of seconds per prompt.
Rollouts: the ratio is of tokens per second on the same rows.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import CACHE, NEW_TOKENS, ROOT, K, measured

HERE = Path(__file__).resolve().parent
RESULTS = CACHE / "results"
TIMEOUT = 900


@dataclass(frozen=True)
class Job:
    """One measurement in a process of its own."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()


def _rollouts(name: str, script: str, *arguments: str) -> list[Job]:
    return [
        Job(f"{name}, {n} prompts", script, (*arguments, "--prompts", str(n), "--rollout-only"))
        for n in (1, 4, 16)
    ]


OWN = ((4, "everything"), (6, "defaults"), (1, "everything"), (1, "defaults"))
"""Prompts and variants of mlx-grpo's own iterations; the first two are what the ratios are of."""
JOBS = [
    *(
        Job(
            f"mlx-grpo, {n} prompts, {variant}",
            "ours",
            ("--prompts", str(n), "--iterations", "2", "--variant", variant),
        )
        for n, variant in OWN
    ),
    *_rollouts("mlx-grpo rollout", "ours"),
    *_rollouts("mlx-lm BatchGenerator", "batch_generator"),
    *_rollouts("mlx-lm-lora rollout, width K", "lm_lora", "--variant", "width-k"),
    Job("mlx-lm-lora, as shipped", "lm_lora", ("--variant", "shipped")),
    Job("mlx-lm-lora, width K", "lm_lora", ("--variant", "width-k")),
    Job("mlx-lm-lora, width K, no KL", "lm_lora", ("--variant", "fastest")),
    Job("inductive-mlxrl, compiled", "inductive_mlxrl", ("--variant", "compiled")),
    Job("inductive-mlxrl, checkpointed", "inductive_mlxrl", ("--variant", "checkpointed")),
    Job("Unsloth-zoo MLX, default", "unsloth_zoo_mlx", ("--variant", "default")),
    Job("Unsloth-zoo MLX, fastest", "unsloth_zoo_mlx", ("--variant", "fastest")),
    Job("Unsloth-zoo MLX, leanest", "unsloth_zoo_mlx", ("--variant", "leanest")),
    Job("TRL, PyTorch CPU", "trl_cpu"),
    *(
        Job(f"{name}, 4 prompts", script, ("--variant", variant, "--prompts", "4"))
        for name, script, variant in (
            ("mlx-lm-lora, width 4 K, no KL", "lm_lora", "fastest"),
            ("inductive-mlxrl, compiled", "inductive_mlxrl", "compiled"),
            ("Unsloth-zoo MLX, fastest", "unsloth_zoo_mlx", "fastest"),
            ("TRL, PyTorch CPU", "trl_cpu", "default"),
        )
    ),
]


def run(job: Job, wanted: bool, again: bool, more: bool, tokens: int) -> dict[str, Any] | None:
    """The job's line of JSON, from this run or an earlier one; None if there is none."""
    stem = job.name.replace(" ", "-").replace(",", "")
    kept = RESULTS / f"{stem}-{tokens}.json"
    before = json.loads(kept.read_text()) if kept.is_file() else None
    if not wanted or (before and not (again or more)):
        return before
    print(f"{time.strftime('%H:%M:%S')}  {job.name}", flush=True)
    log = RESULTS / f"{kept.stem}.log"
    arguments = (*job.arguments, "--tokens", str(tokens))
    try:
        result = measured(HERE / f"{job.script}.py", arguments, log, TIMEOUT)
    except subprocess.TimeoutExpired:
        print(f"          took more than {TIMEOUT} s")
        return before if more else None
    if result is None:
        print(f"          failed, see {log}")
        return before if more else None
    found = {"job": job.name, **result}
    if more and before:
        found = faster(before, found)
    kept.write_text(json.dumps(found))
    return found


def faster(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of two turns of a job the one that took less time, and how many turns there have been."""
    key, sign = "seconds_per_prompt_iteration", 1
    if key not in found:
        key, sign = "rollout_tokens_per_second", -1
    best = min(before, found, key=lambda r: sign * r[key])
    return {**best, "turns": before.get("turns", 1) + found.get("turns", 1)}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line a job: rollout, iteration, memory, and how many times faster mlx-grpo is."""
    head = ("", "rollout tok/s", "s per prompt-iteration", "peak GB", "mlx-grpo is faster by")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
    for name, r in results.items():
        cells = [
            f"{r[key]:{form}}" if key in r else ""
            for key, form in (
                ("rollout_tokens_per_second", ".1f"),
                ("seconds_per_prompt_iteration", ".1f"),
            )
        ]
        memory = f"{r['peak_gb']:.2f}" if "peak_gb" in r else f"{r['rss_gb']:.2f} (RSS)"
        lines.append(f"| {name} | {' | '.join(cells)} | {memory} | {_ratio(r, results)} |")
    return lines


def _ratio(r: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    if r["job"].startswith("mlx-grpo"):
        return ""
    if theirs := r.get("seconds_per_prompt_iteration"):
        own = [results.get(f"mlx-grpo, {n} prompts, {variant}") for n, variant in OWN[:2]]
        ratios = [f"{theirs / o['seconds_per_prompt_iteration']:.2f}x" for o in own if o]
        return " / ".join(ratios)
    ours = results.get(f"mlx-grpo rollout, {r['prompts']} prompts", {})
    speed = ours.get("rollout_tokens_per_second")
    return f"{speed / r['rollout_tokens_per_second']:.2f}x" if speed else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="jobs whose name contains one of these"
    )
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="fewer for a quick trial")
    turn = parser.add_mutually_exclusive_group()
    turn.add_argument("--again", action="store_true", help="run jobs that are done anew")
    turn.add_argument(
        "--more", action="store_true", help="run them once more and keep the faster turn"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "peers.json")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(HERE / "model.py")], check=True)
    results = {}
    for job in JOBS:
        wanted = not args.only or any(part.casefold() in job.name.casefold() for part in args.only)
        found = run(job, wanted, args.again, args.more, args.tokens)
        if found:
            results[job.name] = found
    print(f"\nK = {K}, {args.tokens} new tokens, {os.cpu_count()} cores\n")
    print("\n".join(table(results)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": platform.platform(), "cores": os.cpu_count(), "date": time.strftime("%F")}
    args.output.write_text(json.dumps({**about, "jobs": list(results.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
