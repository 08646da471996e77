"""How fast is each stage of an iteration on this machine, and how fast could it be?

usage: python bench/speed/tokens_per_second.py [--model weights/sft-4bit | --shape smollm2-135m]
           [--rows 1 6 24 48 96] [--prompt 64] [--completion 64] [--json FILE]

Rollout, reward, log-prob (one forward with the head) and update (forward, head, staged backward and
AdamW) in completion tokens per second and share of the time; groups of six rows, as in training, or
of eight.
`--shape` needs no download: random weights of a model's shape (`bench/shapes.py`).

The roofline: what a stage must move and do (`mlx_grpo/plan/timing.py`), divided by the
bandwidth and the FLOP/s this machine reached in the same run. `reached` is that bound over the time
it took. A short warm-up is dropped.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench.shapes import SHAPES, NoTokenizer, move_lora, random_model
from bench.speed.staged_backward import update_settings
from mlx_grpo.backend.device import device_name, limit_memory, recommended_memory
from mlx_grpo.backend.precision import precision_for
from mlx_grpo.core.padding import completion_arrays
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Group, Prompt, TrainingGroup
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import token_weights
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.update import surrogate_gradients
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.decoder import WHOLE, Decoder
from mlx_grpo.models.lora import add_lora, lora_parameters
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.models.optimizer import adamw_step, new_optimizer
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.plan.devices import machine_limits
from mlx_grpo.plan.footprint import footprint_of
from mlx_grpo.plan.memory import Choice, RewardFootprint, Workload
from mlx_grpo.plan.timing import StageCost, stage_costs

K, RANK, JUDGE_RANK = 6, 16, 8


@dataclass(frozen=True)
class Bench:
    """The models and lengths of a run."""

    actor: Decoder
    reference: Decoder
    reward_model: RewardModel
    prompt: int
    completion: int
    backbone: Backbone | None = None
    """Of a converted model; a rollout merges the LoRA into its weights where a run would."""


def groups_of(rows: int) -> int:
    """How many groups the rows make: of six, or of eight where those do not fit."""
    return max(1, rows // K if rows % K == 0 else rows // 8)


def make_bench(
    model: nn.Module, prompt: int, completion: int, backbone: Backbone | None = None
) -> Bench:
    """Actor, reference and reward adapter on one model."""
    actor = add_lora(model, RANK, 2.0, seed=0)
    move_lora(actor, 0.01, seed=1)
    mx.eval(actor.parameters())
    reference = Decoder(model)
    head_1D = mx.random.normal((1, reference.hidden_size), key=key(2, "head"))
    reward = RewardModel(Decoder(add_lora(model, JUDGE_RANK, 2.0, seed=3)), head_1D, None, None)
    return Bench(Decoder(actor), reference, reward, prompt, completion, backbone)


def run_stages(bench: Bench, rows: int, completion: int) -> dict[str, float]:
    """Seconds of each stage for `rows` rows."""
    vocabulary, groups = bench.reference.vocabulary, groups_of(rows)
    drawn = mx.random.randint(0, vocabulary, (groups, bench.prompt), key=key(4, rows)).tolist()
    prompts = [Prompt(f"p{i}", (), tuple(ids)) for i, ids in enumerate(drawn)]
    sampling = Sampling(rows // groups, completion)

    actor = bench.actor.model
    start = time.perf_counter()
    with (
        merged_for_rollout(bench.backbone, actor) if bench.backbone else nullcontext(actor) as model
    ):
        found = rollout(model, NoTokenizer(), frozenset(), prompts, sampling, 0, "bench")
    marks = [time.perf_counter()]
    for group in found:
        bench.reward_model.score(group)
    marks.append(time.perf_counter())
    scored = [_scored(bench, i, group) for i, group in enumerate(found)]
    marks.append(time.perf_counter())
    _update(bench, scored)
    marks.append(time.perf_counter())
    stages = ("rollout", "reward", "log-prob", "update")
    return {n: b - a for n, a, b in zip(stages, [start, *marks], marks, strict=False)}


def _scored(bench: Bench, position: int, group: Group) -> TrainingGroup:
    ids = group.prompt.token_ids
    tokens_KT, mask_KT = completion_arrays(group.completions)
    ref_KT = token_logps(bench.reference, mx.array([ids]), tokens_KT, mask_KT)
    advantages_K = mx.random.normal((len(group.completions),), key=key(5, group.prompt.id))
    return TrainingGroup(position, ids, tokens_KT, mask_KT, ref_KT, advantages_K)


def _update(bench: Bench, groups: list[TrainingGroup]) -> None:
    rows, settings = sum(g.mask_KT.shape[0] for g in groups), update_settings(bench.completion)
    total: dict[str, mx.array] = {}
    for group in groups:
        weights_KT = token_weights(group.mask_KT, "sequence", rows, 1, 1)
        total = surrogate_gradients(bench.actor, [group], [None], [weights_KT], settings, total)[3]
    adamw_step(new_optimizer(1e-4, 0.0), total, lora_parameters(bench.actor.model), 0.5)


def costs_of(bench: Bench, rows: int) -> dict[str, StageCost]:
    """What each stage must move and do."""
    model, groups = bench.reference.model, groups_of(rows)
    dense = not any(isinstance(m, nn.QuantizedLinear) for _, m in model.named_modules())
    sizes = footprint_of(model, sum(v.size for _, v in tree_flatten(model.parameters())))
    work = Workload(groups, rows // groups, bench.prompt, bench.completion, RANK)
    choice = Choice(dense, precision_for(dense).dtype.size, 0, WHOLE)
    costs = stage_costs(sizes, RewardFootprint(sizes.lora_bytes(JUDGE_RANK)), work, choice)
    return {n.replace("logprob", "log-prob"): cost for n, cost in costs.items()}


def measure(bench: Bench, rows: int, limits: tuple[float, float]) -> dict[str, Any]:
    """All figures for one number of rows."""
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds = run_stages(bench, rows, bench.completion)
    tokens, whole = rows * bench.completion, sum(seconds.values())
    stages, costs = {}, costs_of(bench, rows)
    for name, took in seconds.items():
        moving, computing = costs[name].bytes / limits[0], costs[name].flops / limits[1]
        bound = max(moving, computing)
        stages[name] = {
            "seconds": took,
            "tokens_per_second": tokens / took,
            "share": took / whole,
            "bytes": costs[name].bytes,
            "flops": costs[name].flops,
            "bound_by": "bandwidth" if moving > computing else "arithmetic",
            "reached": bound / took,
        }
    return {"rows": rows, "seconds": whole, "peak_bytes": mx.get_peak_memory(), "stages": stages}


HEAD = ("rows", "stage", "tokens/s", "share", "seconds", "GB to move", "GFLOP to do", "bound by")
LINE = "{:>5} {:9} {:>10} {:>6} {:>9} {:>11} {:>12}  {:11} {:>7}"


def show(found: dict[str, Any]) -> None:
    """Print the lines of one number of rows."""
    for name, s in found["stages"].items():
        print(
            LINE.format(
                found["rows"],
                name,
                f"{s['tokens_per_second']:.1f}",
                f"{s['share']:.0%}",
                f"{s['seconds']:.2f}",
                f"{s['bytes'] / 1e9:.1f}",
                f"{s['flops'] / 1e9:.0f}",
                s["bound_by"],
                f"{s['reached']:.0%}",
            )
        )
    print(
        f"{'':5} all       {found['seconds']:.2f} s, {found['peak_bytes'] / 1e9:.2f} GB\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="a converted model")
    which.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 6, 24, 48, 96])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    if odd := [n for n in args.rows if n < 1 or (n > K and n % K and n % 8)]:
        parser.error(f"--rows {odd[0]}: up to {K}, or a multiple of {K} or 8")
    if args.model:
        limit_memory(recommended_memory(), 0)
        backbone = load_backbone(args.model)
        model = backbone.model
    else:
        backbone, model = None, random_model(args.shape)
    bench = make_bench(model, args.prompt, args.completion, backbone)
    limits = machine_limits(mx.float32 if device_name() == "cpu" else mx.bfloat16)
    run_stages(bench, 1, min(4, args.completion))  # MLX compiles kernels at run time
    print(
        f"{args.model or args.shape} on {device_name()}, prompt {args.prompt}, "
        f"completion {args.completion}"
    )
    print(f"this machine: {limits[0] / 1e9:.1f} GB/s, {limits[1] / 1e9:.0f} GFLOP/s\n")
    print(LINE.format(*HEAD, "reached"))
    about = {
        "model": str(args.model or args.shape),
        "device": device_name(),
        "prompt": args.prompt,
        "completion": args.completion,
        "bytes_per_second": limits[0],
        "flops_per_second": limits[1],
    }
    rows = []
    for count in args.rows:
        rows.append(measure(bench, count, limits))
        show(rows[-1])
        if args.json:  # what there is, should the rest take too long
            args.json.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
