"""Minutes until a held-out score, for the settings that compute less: each alone, and together;
and for other trainers.

usage: python -m bench.learning.time_to_reward [--model weights/sft-4bit] [--seeds 42 123 777]
           [--only everything defaults trl ...] [--iterations 20] [--score 0.88] [--output DIR]
           [--json FILE]
       python -m bench.learning.time_to_reward --times 3 [--only everything defaults] [--json FILE]

SmolLM2 follows constraints (examples/constraints.py): 8 prompts x 6 answers of 48 tokens (6 prompts
with the defaults), LoRA 16, the same learning rate, seeds and held-out prompts for all. Every
checkpoint answers the 71 held-out prompts at temperature 0. What is done is not done again; a run
with other settings is refused.

How long an iteration takes does not depend on what is learnt, so it is measured apart, on an idle
machine: `--times N` runs N iterations of each variant in turn, then of each trainer, and notes
their seconds in the same FILE, in the place of all that an earlier run had measured: seconds of two
machines do not compare. Minutes to a score are the iterations to it times those seconds.

Other trainers run in environments of their own (`bench/peers/`) on the same weights, expanded to
fp32, at the settings that make them fastest and a constant learning rate. They take an optimizer
step an iteration, so they get the 4 prompts of one step of `everything`. NAME-RATE is a variant, or
a trainer, with another learning rate.

The others hold no KL: compare them with `defaults-no-kl`, and the KL they end at with its. The KL
of a run is the mean of its second half; of another trainer, that of its last adapter on sampled
answers to the held-out prompts.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import chain, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.learning.common import answered, earlier, finish, parser, ready_to_time
from bench.learning.other_trainers import FASTEST, Trainer, their_adapters, trained_by
from mlx_grpo.config.settings import TrainConfig, train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import lora_parameters, set_parameters
from mlx_grpo.models.roles import new_actor
from mlx_grpo.run import checkpoint, log
from mlx_grpo.training.setup import load_evaluator

EVERY = 5
"""Iterations between two points of a curve."""
MINUTES = (1, 2, 3, 5, 7, 10, 15, 20)
"""At which the curves are shown."""
CONSTRAINTS = "examples/constraints"
COMMON: dict[str, Any] = {
    "rm_model": "none",
    "reward": (f"{CONSTRAINTS}.py:constraints",),
    "prompts": f"{CONSTRAINTS}_train.jsonl",
    "eval_prompts": f"{CONSTRAINTS}_eval.jsonl",
    "batch_size": 8,
    "minibatch_size": 4,
    "update_rows": 0,
    "kl_share": 1.0,
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
    "everything": {},
    "defaults": {"batch_size": 6, "minibatch_size": 2, "update_rows": 3, "kl_share": 0.125},
    "rows": {"update_rows": 3},
    "kl": {"kl_share": 0.25},
    "layers": {"lora_layers": 15},
    "prompts": {"prompt_sampling": "adaptive"},
    "all": {"update_rows": 3, "kl_share": 0.25, "lora_layers": 15},
}
"""What is changed against `COMMON`."""
VARIANTS |= {
    "everything-steps-of-2": {"minibatch_size": 2},
    "defaults-steps-of-3": {**VARIANTS["defaults"], "minibatch_size": 3},
    "defaults-no-kl": {**VARIANTS["defaults"], "kl_control": "none"},
}
RATES = (5e-5, 1e-4, 4e-4)
"""Learning rates that are tried beside that of `COMMON`."""
VARIANTS |= {
    f"{name}-{rate:g}": {**VARIANTS[name], "learning_rate": rate}
    for name, rate in product(("everything", "defaults", "defaults-no-kl"), RATES)
}
TRAINERS = {name: Trainer(*about, COMMON["learning_rate"]) for name, about in FASTEST.items()}
TRAINERS |= {
    f"{name}-{rate:g}": Trainer(*about, rate)
    for (name, about), rate in product(FASTEST.items(), RATES)
}


def own_adapters(run: Path) -> Iterator[tuple[int, Parameters]]:
    """(iteration, adapter) of every checkpoint."""
    for directory in sorted(checkpoint.step_directories(run / "checkpoints")):
        loaded = checkpoint.load(directory)
        yield loaded.iteration, loaded.adapter


def curve(
    run: Path, adapters: Iterable[tuple[int, Parameters]], config: TrainConfig, ui: Console
) -> list[dict[str, float]]:
    """Held-out score of the SFT model and of every adapter."""
    file = run / "curve.json"
    if file.exists():
        return list(read_json(file)["points"])
    points = []
    with judge(config, ui) as (evaluator, actor):
        untrained = lora_parameters(actor.model)
        for iteration, adapter in chain([(0, untrained)], adapters):
            if shapes(adapter) != shapes(untrained):
                raise InputError(f"{run}: the adapter of iteration {iteration} is of another shape")
            set_parameters(actor.model, adapter)
            _, raw_PK, _ = answered(evaluator, actor.model, 0.0)
            score = statistics.fmean(reward for row in raw_PK for reward in row)
            points.append({"iteration": iteration, "score": score})
    write_json(file, {"points": points})
    return points


@contextmanager
def judge(config: TrainConfig, ui: Console) -> Iterator[tuple[Evaluator, Decoder]]:
    """Every held-out prompt, and an actor that takes a run's adapters."""
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
    with closing(evaluator.rewards):
        yield evaluator, actor


def last_kl(run: Path, config: TrainConfig, ui: Console) -> float:
    """KL to the SFT model of another trainer's last adapter."""
    file = run / "kl.json"
    if not file.exists():
        *_, (_, adapter) = their_adapters(run)
        with judge(config, ui) as (evaluator, actor):
            set_parameters(actor.model, adapter)
            write_json(file, {"kl": evaluator(actor).kl})
    return float(read_json(file)["kl"])


def shapes(adapter: Parameters) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in adapter.items()}


def iterations_to(points: list[dict[str, float]], score: float) -> float | None:
    """When the straight line between two points first reaches a score; None: never."""
    if points[0]["score"] >= score:
        return points[0]["iteration"]
    for before, after in pairwise(points):
        if after["score"] >= score:
            part = (score - before["score"]) / (after["score"] - before["score"])
            return before["iteration"] + part * (after["iteration"] - before["iteration"])
    return None


def score_at(points: list[dict[str, float]], iteration: float) -> float | None:
    """The score on the straight line between two points; None: after the last one."""
    if iteration > points[-1]["iteration"]:
        return None
    steps, scores = ([point[name] for point in points] for name in ("iteration", "score"))
    return float(np.interp(iteration, steps, scores))


def configured(name: str, seed: int, run: Path, args: argparse.Namespace) -> TrainConfig:
    """A variant's settings; for another trainer those of the evaluation."""
    return train_config(
        **{**COMMON, **VARIANTS.get(name, {})},
        actor_model=str(args.model),
        num_iterations=args.iterations,
        seed=seed,
        output=str(run),
    )


def one(name: str, seed: int, args: argparse.Namespace, ui: Console) -> dict[str, Any]:
    """Train and measure one run.

    Raises:
        InputError: the run that is there has other settings, or another trainer failed.
    """
    run = args.output / name / f"seed-{seed}"
    config = configured(name, seed, run, args)
    if name in TRAINERS:
        with ui.working(f"{name}, seed {seed}"):
            trained_by(TRAINERS[name], config)
        points = curve(run, their_adapters(run), config, ui)
        more = {"kl": last_kl(run, config, ui)}
    else:
        finish(config, ui)
        points = curve(run, own_adapters(run), config, ui)
        rows = [row for row in log.read(run / log.METRICS) if "kl" in row]
        more = {"kl": statistics.fmean(row["kl"] for row in rows[len(rows) // 2 :])}
    return {"variant": name, "changes": changes(name), "seed": seed, "points": points, **more}


def changes(name: str) -> Any:
    """What makes a variant, or another trainer, as JSON reads it back."""
    found = TRAINERS[name]._asdict() if name in TRAINERS else VARIANTS[name]
    return json.loads(json.dumps(found))


def their_times(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of another trainer's iteration, median; the first one is dropped."""
    with TemporaryDirectory() as place:
        config = configured(name, args.seeds[0], Path(place), args)
        seconds = trained_by(TRAINERS[name], with_settings(config, num_iterations=1 + args.times))
    return {"iteration": statistics.median(seconds[1:])}


def times(names: Sequence[str], args: argparse.Namespace, ui: Console) -> dict[str, Any]:
    """Seconds of an iteration and its stages, medians. The variants take turns; the first turn is
    dropped."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    with ExitStack() as open_:
        runs = {}
        for name in names:
            config = configured(name, args.seeds[0], args.output / name, args)
            runs[name] = ready_to_time(config, open_)
        for turn in range(1 + args.times):
            for name, (learner, state) in runs.items():
                done = iterate(learner, state, Console(quiet=True))
                runs[name] = (learner, done.state)
                if turn:
                    found[name].append(done.metrics)
                    ui.say(f"{name}: {done.metrics['time/iteration']:.1f} s")
    return {
        name: {
            stage: statistics.median(row[f"time/{stage}"] for row in rows)
            for stage in ("iteration", "rollout", "reward", "logprob", "update")
        }
        for name, rows in found.items()
    }


def timed(name: str, seconds: dict[str, Any]) -> float | None:
    """Seconds of an iteration, which no learning rate changes; None: not measured."""
    for rate in RATES:
        name = name.removesuffix(f"-{rate:g}")
    return seconds[name]["iteration"] if name in seconds else None


def show(runs: list[dict[str, Any]], seconds: dict[str, Any], score: float, ui: Console) -> None:
    """A line for each variant, means over its seeds."""
    lines, curves = [], []
    for name in dict.fromkeys([*seconds, *(run["variant"] for run in runs)]):
        own = [run for run in runs if run["variant"] == name]
        to_score = [iterations_to(run["points"], score) for run in own]
        reached = statistics.fmean(to_score) if own and None not in to_score else None
        each = timed(name, seconds)
        first, last = ([run["points"][i]["score"] for run in own] for i in (0, -1))
        minutes = f"{reached * each / 60:.1f}" if reached is not None and each else "-"
        kls = [run["kl"] for run in own if "kl" in run]
        lines.append(
            (
                name,
                f"{len(own)}",
                f"{each:.1f} s" if each else "-",
                f"{max(run['points'][-1]['iteration'] for run in own)}" if own else "-",
                f"{statistics.fmean(first):.3f} -> {statistics.fmean(last):.3f}" if own else "-",
                " ".join(f"{s:.3f}" for s in last),
                f"{reached:.1f}" if reached is not None else "-",
                minutes,
                f"{statistics.fmean(kls):.3f}" if kls else "-",
            )
        )
        if own and each:
            at = [[score_at(run["points"], 60 * m / each) for run in own] for m in MINUTES]
            curves.append((name, *("-" if None in s else f"{statistics.fmean(s):.3f}" for s in at)))
    to = (f"iterations to {score}", "minutes to it")
    columns = ("variant", "seeds", "an iteration", "of", "held-out score", "each", *to, "KL")
    ui.table("Time to reward", columns, lines)
    ui.table("Held-out score after so many minutes", ("variant", *map(str, MINUTES)), curves)


def main() -> int:
    given = parser(__doc__, [*VARIANTS, *TRAINERS], (42, 123, 777), "runs/time-to-reward")
    given.set_defaults(only=["everything", "defaults"])
    given.add_argument("--iterations", type=int, default=20)
    given.add_argument("--score", type=float, default=0.88)
    given.add_argument("--times", type=int, metavar="N", help="only measure seconds")
    args = given.parse_args()
    ui = Console()
    about = {"common": COMMON}
    found: dict[str, Any] = {"seconds": {}, "runs": [], **earlier(args.json, about), **about}
    found["runs"] = [r for r in found["runs"] if r["changes"] == changes(r["variant"])]

    def keep() -> None:
        if args.json:
            write_json(args.json, found)

    try:
        if args.times:
            found["seconds"] = times([n for n in args.only if n in VARIANTS], args, ui)
            keep()
            for name in (n for n in args.only if n in TRAINERS):
                found["seconds"][name] = their_times(name, args)
                ui.say(f"{name}: {found['seconds'][name]['iteration']:.1f} s")
                keep()
        for seed, name in () if args.times else product(args.seeds, args.only):
            others = [r for r in found["runs"] if (r["variant"], r["seed"]) != (name, seed)]
            found["runs"] = [*others, one(name, seed, args, ui)]
            keep()
    except InputError as e:
        ui.error(str(e))
        return 2
    show(found["runs"], found["seconds"], args.score, ui)
    return 0


if __name__ == "__main__":
    sys.exit(main())
