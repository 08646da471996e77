"""Minutes until a held-out score, for the settings that compute less: each alone, and together.

usage: python -m bench.learning.time_to_reward [--model weights/sft-4bit] [--seeds 42 123 777]
           [--only off all] [--iterations 20] [--score 0.7] [--output DIR] [--json FILE]

SmolLM2 follows constraints (examples/constraints.py): 8 prompts x 6 answers of 48 tokens, LoRA 16,
the same learning rate, seeds and held-out prompts for all. Every checkpoint answers the 71 held-out
prompts at temperature 0. Time is that of the iterations alone, so leave the machine idle. What is
done is not done again.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import statistics
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.learning.common import answered, finish, parser
from mlx_grpo.config.settings import TrainConfig, train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.models.lora import set_parameters
from mlx_grpo.models.roles import new_actor
from mlx_grpo.run import checkpoint, log
from mlx_grpo.training.setup import load_evaluator

EVERY = 5
"""Iterations between two points of a curve."""
CONSTRAINTS = "examples/constraints"
COMMON: dict[str, Any] = {
    "rm_model": "none",
    "reward": (f"{CONSTRAINTS}.py:constraints",),
    "prompts": f"{CONSTRAINTS}_train.jsonl",
    "eval_prompts": f"{CONSTRAINTS}_eval.jsonl",
    "batch_size": 8,
    "minibatch_size": 4,
    "max_completion_length": 48,
    "learning_rate": 2e-4,
    "kl_schedule": "constant",
    "kl_targets": (0.05,),
    "eval_every": 1000,
    "eval_limit": 1,
    "checkpoint_every": EVERY,
    "keep": 1000,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "rows": {"update_rows": 3},
    "kl": {"kl_share": 0.25},
    "layers": {"lora_layers": 15},
    "prompts": {"prompt_sampling": "adaptive"},
    "all": {"update_rows": 3, "kl_share": 0.25, "lora_layers": 15},
}
"""What is changed against `COMMON`."""


def curve(run: Path, config: TrainConfig, ui: Console) -> list[dict[str, float]]:
    """Minutes and held-out score of every checkpoint, from the SFT model on."""
    file = run / "curve.json"
    if file.exists():
        return list(read_json(file)["points"])
    seconds = [row["time/iteration"] for row in log.read(run / log.METRICS) if "kl" in row]
    evaluator = load_evaluator(with_settings(config, eval_limit=0), ui)
    model = config.model
    actor = new_actor(
        evaluator.backbone,
        model.lora_rank,
        model.lora_scale,
        0,
        layers=model.lora_layers,
        expert_rank=model.expert_lora_rank,
    )
    points = []
    saved = sorted(checkpoint.step_directories(run / "checkpoints"))
    with closing(evaluator.rewards):
        for directory in [None, *saved]:
            loaded = checkpoint.load(directory) if directory else None
            if loaded:
                set_parameters(actor.model, loaded.adapter)
            _, raw_PK, _ = answered(evaluator, actor.model, 0.0)
            done = loaded.iteration if loaded else 0
            score = statistics.fmean(reward for row in raw_PK for reward in row)
            minutes = sum(seconds[:done]) / 60
            points.append({"iteration": done, "minutes": minutes, "score": score})
    write_json(file, {"points": points})
    return points


def minutes_to(points: list[dict[str, float]], score: float) -> float | None:
    """When the straight line between two points first reaches a score; None: never."""
    for before, after in pairwise(points):
        if before["score"] < score <= after["score"]:
            part = (score - before["score"]) / (after["score"] - before["score"])
            return before["minutes"] + part * (after["minutes"] - before["minutes"])
    return None


def one(name: str, seed: int, args: argparse.Namespace, ui: Console) -> dict[str, Any]:
    """Train and measure one run."""
    run = args.output / name / f"seed-{seed}"
    config = train_config(
        **{**COMMON, **VARIANTS[name]},
        actor_model=str(args.model),
        num_iterations=args.iterations,
        seed=seed,
        output=str(run),
    )
    finish(config, ui)
    points = curve(run, config, ui)
    rows = [row for row in log.read(run / log.METRICS) if "kl" in row]
    return {
        "variant": name,
        "seed": seed,
        "points": points,
        "seconds_per_iteration": statistics.median(row["time/iteration"] for row in rows),
        "kl": statistics.fmean(row["kl"] for row in rows[len(rows) // 2 :]),
        "minutes_to_score": minutes_to(points, args.score),
    }


def show(runs: list[dict[str, Any]], score: float, ui: Console) -> None:
    """A line for each variant, means over its seeds."""
    lines = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == name]
        reached = [r["minutes_to_score"] for r in own if r["minutes_to_score"] is not None]
        first, last = ([run["points"][i]["score"] for run in own] for i in (0, -1))
        lines.append(
            (
                name,
                f"{len(own)}",
                f"{statistics.fmean(r['seconds_per_iteration'] for r in own):.1f} s",
                f"{statistics.fmean(first):.3f} -> {statistics.fmean(last):.3f}",
                " ".join(f"{s:.3f}" for s in last),
                f"{statistics.fmean(reached):.1f}" if reached else "-",
                f"{len(reached)} of {len(own)}",
                f"{statistics.fmean(r['kl'] for r in own):.3f}",
            )
        )
    columns = ("variant", "seeds", "an iteration", "held-out score", "each", f"minutes to {score}")
    ui.table("Time to reward", (*columns, "reached by", "KL"), lines)


def main() -> None:
    given = parser(__doc__, VARIANTS, (42, 123, 777), "runs/time-to-reward")
    given.add_argument("--iterations", type=int, default=20)
    given.add_argument("--score", type=float, default=0.7)
    args = given.parse_args()
    ui, runs = Console(), []
    for seed in args.seeds:
        for name in args.only:
            runs.append(one(name, seed, args, ui))
            if args.json:
                settings = {"iterations": args.iterations, "score": args.score}
                write_json(args.json, {**settings, "common": COMMON, "runs": runs})
    show(runs, args.score, ui)


if __name__ == "__main__":
    main()
