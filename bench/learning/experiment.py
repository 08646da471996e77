"""Does it learn, and does the KL stay on its target? Three seeds and three variants, compared with
the SFT model on the held-out prompts.

    python bench/learning/experiment.py  # a few hours on two CPU cores; can be stopped
    python bench/learning/experiment.py --json bench/results/experiment.json

Needs `weights/sft-4bit` and `weights/rm-4bit` (`make demo` or `mlx-grpo convert`). What is done is
not done again: a run that is finished is only measured, a measured one only read.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.learning.common import finish
from mlx_grpo.config.settings import flat_values, with_settings
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.stats import cohens_d, mean_interval, win_rate
from mlx_grpo.evaluation.compare import compare_run, contests
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.grpo.evaluate import Evaluation
from mlx_grpo.report.record import read
from mlx_grpo.run import log
from mlx_grpo.run.directory import chosen_adapter

SETTINGS = Path(__file__).with_name("experiment.toml")
FIGURES = "judged.json"
DECODING = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures of the answers that are judged."""
GOLD = "mlx_grpo.rubric:gold"
JUDGES = ("reward", "gold")
CONSTRAINTS = "examples/constraints"


@dataclass(frozen=True)
class Variant:
    """What is changed against `experiment.toml`, and the seeds it runs with."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (42,)


VARIANTS = (
    Variant("decay", {}, (42, 123, 777)),
    Variant("none", {"kl_control": "none"}),
    Variant("std", {"scale_advantages": "std"}),
    Variant(
        "constraints",
        {
            "rm_model": "none",
            "reward": (f"{CONSTRAINTS}.py:constraints",),
            "prompts": f"{CONSTRAINTS}_train.jsonl",
            "eval_prompts": f"{CONSTRAINTS}_eval.jsonl",
        },
    ),
)


@dataclass(frozen=True)
class Scores:
    """One judge's marks of both policies' answers, prompt by prompt."""

    before: float
    after: float
    win_rate: float
    """Of the trained policy; ties count half."""
    interval: tuple[float, float]
    """95 %, Wilson."""
    cohens_d: float
    """See `core/stats.py`."""

    @staticmethod
    def of(before: Sequence[float], after: Sequence[float]) -> "Scores":
        wins = win_rate(before, after)
        return Scores(
            statistics.fmean(before),
            statistics.fmean(after),
            wins.share,
            wins.wilson(),
            cohens_d(before, after),
        )


def seed_run(variant: Variant, seed: int, output: Path, ui: Console) -> dict[str, Any]:
    """Train, measure, and return the figures of one run; what is there is not done again."""
    run = output / variant.name / f"seed-{seed}"
    config = with_settings(build_config(SETTINGS), seed=seed, output=str(run), **variant.changes)
    finish(config, ui, f"{variant.name}, seed {seed}")
    if not (run / FIGURES).exists():
        write_json(run / FIGURES, _judged_run(run, ui))
    rows = log.read(run / log.METRICS)
    return {
        "variant": variant.name,
        "seed": seed,
        **read_json(run / FIGURES),
        "kl_by_phase": phases(rows),
        "iterations_to_60_percent": read(run, running=False).winning_from(0.6),
        "iterations": _curve(rows, ITERATION),
        "evaluations": _curve(rows, EVALUATION),
        "seconds": sum(
            v for r in rows for v in (r.get("time/iteration"), r.get("time/evaluate")) if v
        ),
    }


def _judged_run(run: Path, ui: Console) -> dict[str, Any]:
    """Wins on prompts that did not choose the adapter, by greedy and by sampled answers."""
    found = {
        how: compare_run(run, None, "", ui, judges=(GOLD,), temperature=temperature)
        for how, temperature in DECODING.items()
    }
    sampled = found["sampled"]
    return {
        "adapter": chosen_adapter(run, "").name,
        "prompts": len(sampled.before.groups),
        **{
            how: {j: asdict(Scores.of(*contests(c)[j])) for j in JUDGES} for how, c in found.items()
        },
        "before": _policy(sampled.before),
        "after": _policy(sampled.after),
    }


ITERATION = ("step", "reward", "kl", "kl/target", "kl/decay", "completions/mean_length")
EVALUATION = ("step", "eval_reward", "eval_kl", "eval_perplexity", "eval_best")


def _curve(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{n: row[n] for n in names} for row in rows if names[1] in row]


def _policy(e: Evaluation) -> dict[str, float]:
    return {
        "kl": e.kl,
        "perplexity": e.perplexity,
        "length": e.mean_length,
        "finished": e.finished,
    }


def phases(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Target and mean measured KL of the second half of each phase."""
    by_target: dict[float, list[float]] = {}
    for row in rows:
        if "kl" in row:
            by_target.setdefault(row["kl/target"], []).append(row["kl"])
    return [
        {"target": target, "kl": statistics.fmean(seen[len(seen) // 2 :])}
        for target, seen in by_target.items()
    ]


def main() -> None:
    """Run or resume everything; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=[v.name for v in VARIANTS], help="one variant")
    arguments = parser.parse_args()
    ui = Console()
    runs = [
        seed_run(variant, seed, arguments.output, ui)
        for variant in VARIANTS
        if arguments.only in (None, variant.name)
        for seed in variant.seeds
    ]
    show(runs, ui)
    if arguments.json:
        write_json(arguments.json, {"settings": flat_values(build_config(SETTINGS)), "runs": runs})


def show(runs: list[dict[str, Any]], ui: Console) -> None:
    """The tables of bench/RESULTS.md."""
    for how in DECODING:
        ui.table(
            f"{runs[0]['prompts']} held-out prompts that chose nothing, {how} answers: "
            "SFT model -> adapter; wins of the adapter",
            ("run", "reward", "wins", "gold", "wins", "adapter"),
            [
                (_name(r), *(cell for j in JUDGES for cell in _judged(r[how][j])), r["adapter"])
                for r in runs
            ],
        )
    ui.table(
        "The same, beyond the reward",
        ("run", "KL", "perplexity", "length", "finished", "KL / target by phase"),
        [
            (
                _name(r),
                f"{r['after']['kl']:.3f}",
                *(
                    f"{r['before'][n]:{form}} -> {r['after'][n]:{form}}"
                    for n, form in (("perplexity", ".1f"), ("length", ".0f"), ("finished", ".0%"))
                ),
                ", ".join(f"{p['kl'] / p['target']:.2f}" for p in r["kl_by_phase"]),
            )
            for r in runs
        ],
    )
    main_runs = [r for r in runs if r["variant"] == VARIANTS[0].name]
    if len(main_runs) > 1:
        ui.table(
            f"Over {len(main_runs)} seeds, mean (95 % interval)",
            ("", "gain", "win rate", "Cohen's d"),
            [
                (f"{judge}, {how}", *_over_seeds([r[how][judge] for r in main_runs]))
                for how in DECODING
                for judge in JUDGES
            ],
        )


def _name(run: dict[str, Any]) -> str:
    return f"{run['variant']} {run['seed']}"


def _judged(scores: dict[str, Any]) -> tuple[str, str]:
    low, high = scores["interval"]
    return (
        f"{scores['before']:.3f} -> {scores['after']:.3f}",
        f"{scores['win_rate']:.0%} ({low:.0%} to {high:.0%})",
    )


def _over_seeds(scores: list[dict[str, Any]]) -> tuple[str, ...]:
    gains = [s["after"] - s["before"] for s in scores]
    figures = (gains, [s["win_rate"] for s in scores], [s["cohens_d"] for s in scores])
    return tuple(
        f"{statistics.fmean(x):.3f} ({low:.3f} to {high:.3f})"
        for x in figures
        for low, high in [mean_interval(x)]
    )


if __name__ == "__main__":
    main()
