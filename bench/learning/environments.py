"""Do the two examples with tools learn? Success on held-out instances, before and after.

usage: python -m bench.learning.environments [--model weights/sft-4bit] [--seeds 1 2 3]
           [--only calculator number_game] [--instances 48] [--output DIR] [--json FILE]

Trains with examples/NAME.toml, seed by seed. The instances of examples/NAME_test.jsonl, which
neither trained nor chose anything, are answered by the SFT model and by the adapter that each run
ends with, once greedily and once sampled at temperature 1. What is done is not done again.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.nn as nn

from bench.learning.common import answered, finish, parser
from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.stats import WinRate
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.models.lora import load_adapter
from mlx_grpo.training.setup import load_evaluator

EXAMPLES = Path("examples")
SHOWN = {"calculator": ("right", "used"), "number_game": ("found",)}
"""Figures of each example that are 0 or 1 for an answer."""
DECODING = {"greedy": 0.0, "sampled": 1.0}


def judged(evaluator: Evaluator, model: nn.Module) -> dict[str, Any]:
    """Of one policy: how often each figure was 1, among how many answers; tool calls of each."""
    found = {}
    for how, temperature in DECODING.items():
        groups, _, by_source = answered(evaluator, model, temperature)
        answers = [c for group in groups for c in group.completions]
        found[how] = {
            "answers": len(answers),
            "calls": sum(c.calls for c in answers) / len(answers),
            "failures": sum(c.failures for c in answers),
            **{name: sum(by_source[name]) for name in by_source},
        }
    return found


def example(name: str, args: argparse.Namespace, ui: Console) -> list[dict[str, Any]]:
    """Train and judge all seeds of one example; the SFT model is the first row."""
    base = build_config(EXAMPLES / f"{name}.toml", {"actor_model": str(args.model)})
    place, judged_file = args.output / name, f"judged-{args.instances or 'all'}.json"
    before = place / judged_file
    if not before.exists():
        place.mkdir(parents=True, exist_ok=True)
        write_json(before, _judge(base, name, None, args.instances, ui))
    rows = [{"example": name, "seed": None, **read_json(before)}]
    for seed in args.seeds:
        run = place / f"seed-{seed}"
        config = with_settings(base, seed=seed, output=str(run))
        finish(config, ui)
        if not (run / judged_file).exists():
            found = _judge(config, name, run / "final", args.instances, ui)
            write_json(run / judged_file, found)
        rows.append({"example": name, "seed": seed, **read_json(run / judged_file)})
    return rows


def _judge(
    config: TrainConfig, name: str, adapter: Path | None, instances: int, ui: Console
) -> dict[str, Any]:
    file = str(EXAMPLES / f"{name}_test.jsonl")
    config = with_settings(config, eval_prompts=file, eval_limit=instances)
    evaluator = load_evaluator(config, ui)
    model = evaluator.backbone.model
    with closing(evaluator.rewards):
        return judged(evaluator, load_adapter(model, adapter) if adapter else model)


def show(rows: list[dict[str, Any]], ui: Console) -> None:
    """A table for each example: share of the answers and its 95 % interval (Wilson)."""
    for name in dict.fromkeys(row["example"] for row in rows):
        own = [row for row in rows if row["example"] == name]
        figures = [(how, figure) for figure in SHOWN[name] for how in DECODING]
        ui.table(
            f"{name}: {own[0]['greedy']['answers']} held-out instances",
            ("policy", *(f"{figure}, {how}" for how, figure in figures), "calls, sampled"),
            [
                (
                    f"seed {row['seed']}" if row["seed"] is not None else "SFT model",
                    *(f"{WinRate(row[h][f], row[h]['answers'])}" for h, f in figures),
                    f"{row['sampled']['calls']:.2f}",
                )
                for row in own
            ],
        )


def main() -> None:
    """Run or resume everything; print the tables."""
    given = parser(__doc__, SHOWN, (1, 2, 3), "runs/environments")
    given.add_argument("--instances", type=int, default=0, help="first ones; 0 means all")
    args = given.parse_args()
    ui, rows = Console(), list[dict[str, Any]]()
    for name in args.only:
        rows += example(name, args, ui)
        if args.json:
            write_json(args.json, {"seeds": args.seeds, "rows": rows})
    show(rows, ui)


if __name__ == "__main__":
    main()
