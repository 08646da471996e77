"""Does it learn, and does the KL stay on its target? The reference protocol in small: 800
iterations on a reward model with three seeds, and on a reward that can be checked with one.

usage: python -m bench.learning.experiment [--only decay constraints] [--seeds 42 123 777]
           [--output runs/experiment] [--json bench/results/experiment.json]

Settings are in `experiment.toml`; two to four hours of one CPU core a seed, less with
`sh bench/blas/with.sh` in front. Needs `weights/sft-4bit` and `weights/rm-4bit` (`make demo` or
`mlx-grpo convert`), and PyTorch with the embedding model for the third judge
(`bench/learning/similarity.py`). It may be stopped: what is done is not done again, and each seed's
figures are written as soon as they are there. --json keeps the runs of other seeds that the file
has, and the tables show them too.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.learning.common import earlier, finish, parser
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
DECODING = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures of the answers that are judged."""
GOLD = "mlx_grpo.rubric:gold"
SIMILARITY = "bench.learning.similarity:similarity"
JUDGES = ("reward", "gold", "similarity")
CONSTRAINTS = "examples/constraints"
ITERATION = ("step", "reward", "kl", "kl/target", "kl/decay", "completions/mean_length")
WINDOW = 10
"""Iterations whose means are a point of a curve."""
EVALUATION = ("step", "eval_reward", "eval_kl", "eval_perplexity", "eval_best")


VARIANTS: dict[str, dict[str, Any]] = {
    "decay": {},
    "constraints": {
        "rm_model": "none",
        "reward": (f"{CONSTRAINTS}.py:constraints",),
        "prompts": f"{CONSTRAINTS}_train.jsonl",
        "eval_prompts": f"{CONSTRAINTS}_eval.jsonl",
    },
}
"""What is changed against `experiment.toml`."""


@dataclass(frozen=True)
class Scores:
    """One judge's marks of both policies' answers, prompt by prompt."""

    before: float
    after: float
    win_rate: float
    """Of the trained policy; ties count half."""
    interval: tuple[float, float]
    """95 %, Wilson."""
    ties: float
    """Share of the prompts."""
    cohens_d: float | None
    """See `core/stats.py`."""

    @staticmethod
    def of(before: Sequence[float], after: Sequence[float]) -> "Scores":
        wins = win_rate(before, after)
        return Scores(
            statistics.fmean(before),
            statistics.fmean(after),
            wins.share,
            wins.wilson(),
            wins.ties / wins.prompts,
            cohens_d(before, after),
        )


def seed_run(variant: str, seed: int, output: Path, ui: Console, **given: Any) -> dict[str, Any]:
    """Train, measure, and return the figures of one run; what is there is not done again.

    Args:
        given: further settings.
    """
    run = output / variant / f"seed-{seed}"
    changes = {**VARIANTS[variant], **given, "seed": seed, "output": str(run)}
    finish(with_settings(build_config(SETTINGS), **changes), ui, f"{variant}, seed {seed}")
    rows = log.read(run / log.METRICS)
    return {
        "variant": variant,
        "seed": seed,
        **_judged_run(run, ui),
        "kl_by_phase": phases(rows),
        "iterations_to_60_percent": read(run, running=False).winning_from(0.6),
        "iterations": _means([row for row in rows if "kl" in row]),
        "evaluations": [
            {name: row[name] for name in EVALUATION} for row in rows if "eval_kl" in row
        ],
        "seconds_per_iteration": statistics.median(r["time/iteration"] for r in rows if "kl" in r),
    }


def _means(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of every `WINDOW` iterations."""
    windows = (rows[i : i + WINDOW] for i in range(0, len(rows), WINDOW))
    return [{n: statistics.fmean(row[n] for row in some) for n in ITERATION} for some in windows]


def _judged_run(run: Path, ui: Console) -> dict[str, Any]:
    """Wins on prompts that did not choose the adapter, by greedy and by sampled answers; of the
    last adapter as well, where another one was chosen."""
    found = _judged_adapter(run, "", ui)
    if found["adapter"] == "best":
        found["final"] = _judged_adapter(run, "final", ui)
    return found


def _judged_adapter(run: Path, adapter: str, ui: Console) -> dict[str, Any]:
    name = chosen_adapter(run, adapter).name
    found = {how: judged(run, name, how, ui) for how in DECODING}
    policies = {side: found["sampled"][side] for side in ("prompts", "before", "after")}
    return {"adapter": name, **policies, **{how: found[how]["scores"] for how in DECODING}}


def judged(run: Path, adapter: str, how: str, ui: Console) -> dict[str, Any]:
    """The SFT model's answers and an adapter's, decoded as `DECODING` has it, by each judge. It is
    kept in the run's directory; a second process may judge the other adapter meanwhile."""
    file = run / f"judged-{adapter}-{how}.json"
    if not file.exists():
        judges = (GOLD, SIMILARITY)
        c = compare_run(run, None, adapter, ui, judges=judges, temperature=DECODING[how])
        scores = contests(c)
        about = {
            "prompts": len(c.before.groups),
            "scores": {judge: asdict(Scores.of(*scores[judge])) for judge in JUDGES},
            "before": _policy(c.before),
            "after": _policy(c.after),
        }
        write_json(file, about)
    return read_json(file)


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
    given = parser(__doc__, VARIANTS, (42, 123, 777), "runs/experiment")
    args, ui = given.parse_args(), Console()
    runs: list[dict[str, Any]] = []
    for variant in args.only:
        for seed in args.seeds if variant == "decay" else args.seeds[:1]:
            found = seed_run(variant, seed, args.output, ui, actor_model=str(args.model))
            runs = keep(args.json, found, args.model) if args.json else [*runs, found]
    show(runs, ui)


def keep(file: Path, run: dict[str, Any], model: Path) -> list[dict[str, Any]]:
    """Put a run's figures into the file, in the place of an earlier one of that name; those of
    other settings or another model go. Returns all that it holds."""
    about = {"settings": flat_values(build_config(SETTINGS, {"actor_model": str(model)}))}
    others = earlier(file, about).get("runs", [])
    runs = sorted([r for r in others if _name(r) != _name(run)] + [run], key=_name)
    write_json(file, {**about, "runs": runs})
    return runs


def show(runs: list[dict[str, Any]], ui: Console) -> None:
    """The tables of bench/RESULTS.md."""
    policies = [(_name(r), r, r) for r in runs]
    policies += [(f"{_name(r)}, last", r, r["final"]) for r in runs if "final" in r]
    for how in DECODING:
        ui.table(
            f"Prompts that chose nothing, {how} answers: SFT model -> adapter; wins of the adapter",
            ("run", "prompts", *(name for j in JUDGES for name in (j, "wins"))),
            [
                (name, str(p["prompts"]), *(cell for j in JUDGES for cell in _judged(p[how][j])))
                for name, _, p in policies
            ],
        )
    ui.table(
        "The same, beyond the reward",
        ("run", "adapter", "KL", "perplexity", "length", "finished", "KL / target by phase"),
        [
            (
                name,
                p["adapter"],
                f"{p['after']['kl']:.3f}",
                *(
                    f"{p['before'][n]:{form}} -> {p['after'][n]:{form}}"
                    for n, form in (("perplexity", ".1f"), ("length", ".0f"), ("finished", ".0%"))
                ),
                ", ".join(f"{x['kl'] / x['target']:.2f}" for x in r["kl_by_phase"]),
            )
            for name, r, p in policies
        ],
    )
    main_runs = [r for r in runs if r["variant"] == "decay"]
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
