"""Measured against planned peak memory of a whole iteration, stage by stage.

usage: python bench/memory/measure.py [--shape gemma-2b] [--limit 2.5GB] [--rm adapter|full|none]
           [--prompts 1] [--k 6] [--prompt 256] [--completion 256] [--rank 16] [--expert-rank 2]
           [--depth 0] [--weights auto|dense|packed] [--steps 1] [--json FILE]

Random weights of a model's shape, no download. Every answer has the full length. The run is cut to
fit `--limit` as the planner chooses for the same model and lengths: rollout, reward, log-probs,
update with steps of AdamW, whose moments and the state to go back to are there from the start.
`--depth N` takes N blocks only: a peak is affine in depth. `--weights dense` measures on a CPU what
is above the weights in fp32; the 4-bit kernels take no memory of their own, but run 100 times
slower there.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import math
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, load_model

from bench.shapes import SHAPES, NoTokenizer, decoder_fields, shape_config
from mlx_grpo.backend.device import device_name, limit_memory, recommended_memory
from mlx_grpo.backend.precision import apply_precision, precision_for
from mlx_grpo.config.checks import parse_bytes
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Prompt
from mlx_grpo.grpo.advantages import training_group
from mlx_grpo.grpo.loss import Clip
from mlx_grpo.grpo.metrics import Clock
from mlx_grpo.grpo.reference import kl_to_reference
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.update import UpdateSettings, update
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import add_lora, lora_parameters
from mlx_grpo.models.merging import merged
from mlx_grpo.models.optimizer import new_optimizer
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.models.streamed_reward_model import StreamedRewardModel
from mlx_grpo.plan.footprint import Footprint, footprint_of
from mlx_grpo.plan.memory import (
    STREAMED_HIDDEN,
    Choice,
    Plan,
    RewardFootprint,
    Workload,
    choose,
    predict,
)

EARLY = 20
"""The iteration whose peak the last one's is compared with."""


@dataclass(frozen=True)
class Figures:
    """Of a stage."""

    bytes: int
    seconds: float


def quantized(shape: str, depth: int) -> nn.Module:
    """Random 4-bit weights of the shape, in bf16 where they are not packed; not evaluated."""
    config = shape_config(shape, depth)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    return model


def sizes_of(shape: str, depth: int) -> Footprint:
    """Footprint of the shape, nothing evaluated."""
    config = shape_config(shape, depth)
    model_class, args_class = _get_classes(config)
    plain = tree_flatten(model_class(args_class.from_dict(config)).parameters())
    return footprint_of(quantized(shape, depth), sum(v.size for _, v in plain))


def loaded(shape: str, depth: int, dense: bool) -> nn.Module:
    """The model as a run holds it."""
    model = quantized(shape, depth)
    apply_precision(model, precision_for(dense))
    mx.eval(model.parameters())
    model.freeze()
    return model


def write_model(directory: Path, shape: str, depth: int) -> None:
    """A model directory of the shape, for a reward model that is read anew."""
    model = quantized(shape, depth)
    weights = dict(tree_flatten(model.parameters()))
    for value in weights.values():  # one by one: what they are made from is larger than they are
        mx.eval(value)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = shape_config(shape, depth)
    quantization = {"group_size": 64, "bits": 4}
    (directory / "config.json").write_text(json.dumps({**config, "quantization": quantization}))


def planned(args: argparse.Namespace) -> Plan:
    """What the planner chooses for this benchmark's flags."""
    model = sizes_of(args.shape, args.depth)
    rewards = {
        "none": RewardFootprint(),
        "adapter": RewardFootprint(model.lora_bytes(8)),
        "full": RewardFootprint(model=model),
    }
    work = Workload(
        *(args.prompts, args.k, args.prompt, args.completion, args.rank, args.steps),
        expert_rank=args.expert_rank,
    )
    dense = args.weights == "dense" or (args.weights == "auto" and device_name() == "cpu")
    size = precision_for(dense).dtype.size
    limit = parse_bytes(args.limit) or recommended_memory()
    if args.sizes:
        sizes = Sizes(args.sizes[0], args.sizes[1], args.sizes[2] << 20)
        rows = args.decode_rows or args.prompts * args.k
        choice = Choice(dense, size, rows, sizes, args.residency == "swap")
        return predict(model, rewards[args.rm], work, choice, limit)
    given = Choice(dense, size, args.decode_rows, Sizes())
    return choose(model, rewards[args.rm], work, limit, [given], args.residency)


def judge_of(
    args: argparse.Namespace, plan: Plan, model: nn.Module, place: Path
) -> RewardModel | StreamedRewardModel | None:
    """The reward model that was asked for."""
    head_1D = mx.random.normal((1, decoder_fields(args.shape)["hidden_size"]), key=key(2, "head"))
    sizes, precision = plan.choice.sizes, precision_for(plan.choice.dense)
    if args.rm == "none":
        return None
    if args.rm == "adapter":
        return RewardModel(Decoder(add_lora(model, 8, 2.0, seed=3), sizes), head_1D, None, None)
    if not plan.choice.swap:
        own = loaded(args.shape, args.depth, plan.choice.dense)
        return RewardModel(Decoder(own, sizes), head_1D, None, None)
    write_model(place, args.shape, args.depth)
    mx.clear_cache()
    return StreamedRewardModel(place, precision, sizes, STREAMED_HIDDEN, head_1D, None, None)


def measure(args: argparse.Namespace, plan: Plan, place: Path) -> list[dict[str, Figures]]:
    """Peak and time of each stage of every iteration."""
    choice = plan.choice
    limit_memory(plan.limit, plan.weights + plan.reward_model + plan.adapter)
    model = loaded(args.shape, args.depth, choice.dense)
    actor = Decoder(add_lora(model, args.rank, 2.0, 0, 0, args.expert_rank), choice.sizes)
    reference = Decoder(model, choice.sizes)
    reward = judge_of(args, plan, model, place)
    stored = place / "stored"
    stored.mkdir()
    write_model(stored, args.shape, args.depth)
    optimizer = new_optimizer(1e-6, 0.0)
    optimizer.init(tree_unflatten(list(lora_parameters(actor.model).items())))
    mx.eval(optimizer.state)  # as from the second iteration on
    mx.clear_cache()
    found = []
    for iteration in range(args.iterations):
        clock = Clock()
        before = {**lora_parameters(actor.model)}, dict(tree_flatten(optimizer.state))
        one(args, plan, iteration, actor, reference, reward, optimizer, clock, stored)
        del before
        mx.clear_cache()
        found.append({n: Figures(clock.peaks[n], clock.seconds[n]) for n in clock.peaks})
    return found


def peak(stages: dict[str, Figures]) -> int:
    """Bytes of an iteration."""
    return max(f.bytes for f in stages.values())


def sampling_form(plan: Plan, actor: nn.Module, stored: Path) -> AbstractContextManager[nn.Module]:
    """As `models.merging.merged_for_rollout` does, for a model without a directory of its own."""
    if not precision_for(plan.choice.dense).merge_lora:
        return nullcontext(actor)
    return merged(actor, load_model(stored, lazy=True)[0])


def one(
    args: argparse.Namespace,
    plan: Plan,
    iteration: int,
    actor: Decoder,
    reference: Decoder,
    reward: RewardModel | StreamedRewardModel | None,
    optimizer: Any,
    clock: Clock,
    stored: Path,
) -> None:
    """An iteration, as `mlx_grpo/grpo/iteration.py` runs it."""
    drawn = mx.random.randint(0, reference.vocabulary, (args.prompts, args.prompt)).tolist()
    prompts = [Prompt(f"p{i}", (), tuple(ids)) for i, ids in enumerate(drawn)]
    sampling = Sampling(args.k, args.completion, 1.0, plan.choice.decode_rows)
    settings = UpdateSettings(
        clip=Clip(),
        aggregation="sequence",
        temperature=1.0,
        max_tokens=args.completion,
        max_grad_norm=0.5,
        minibatch_size=-(-args.prompts // args.steps),
        epochs=1,
        kl_stop=math.inf,
        rows_per_pass=plan.choice.sizes.rows,
    )
    with clock.stage("rollout"), sampling_form(plan, actor.model, stored) as sampled:
        tokenizer, stop = NoTokenizer(), frozenset()
        groups = rollout(sampled, tokenizer, stop, prompts, sampling, 0, "bench", iteration)
    with clock.stage("reward"):
        if isinstance(reward, StreamedRewardModel):
            reward.score_groups(groups)
        elif reward:
            for group in groups:
                reward.score(group)
    with clock.stage("logprob"):
        kl_to_reference(groups, [range(args.k)] * len(groups), reference, 1.0)
    # random weights may score all answers the same, and the update is to have work
    scores_K = [float(i) for i in range(args.k)]
    training = [training_group(i, g, range(args.k), scores_K) for i, g in enumerate(groups)]
    with clock.stage("update"):
        update(actor, optimizer, training, settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gemma-2b")
    parser.add_argument("--limit", default="")
    parser.add_argument("--rm", choices=("adapter", "full", "none"), default="adapter")
    parser.add_argument("--weights", choices=("auto", "dense", "packed"), default="auto")
    parser.add_argument("--residency", choices=("auto", "resident", "swap"), default="auto")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=3,
        metavar=("ROWS", "MLP_TOKENS", "HEAD_MIB"),
        help="instead of the planner's choice; 0: all",
    )
    numbers = {"prompts": 1, "k": 6, "prompt": 256, "completion": 256, "rank": 16, "expert-rank": 2}
    zeros = {"depth": 0, "decode-rows": 0, "steps": 1, "iterations": 1}
    for name, default in (numbers | zeros).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plan-only", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, help="add a line with all figures there")
    args = parser.parse_args()
    plan = planned(args)
    c = plan.choice
    depth = args.depth or decoder_fields(args.shape)["num_hidden_layers"]
    print(
        f"{args.shape} on {device_name()}, {'dense fp32' if c.dense else '4-bit'}, depth "
        f"{depth}, {args.prompts} x {args.k}, "
        f"{args.prompt} + {args.completion} tokens, limit {args.limit or 'none'}: rows "
        f"{c.decode_rows}, {c.sizes}{', reward model read anew' if c.swap else ''}"
    )
    found: list[dict[str, Figures]] = []
    if not args.plan_only:
        with tempfile.TemporaryDirectory() as place:
            found = measure(args, plan, Path(place))
    show(plan, found)
    if args.json:
        flags = {k: v for k, v in vars(args).items() if k not in ("json", "plan_only")}
        line = {
            **flags,
            "device": device_name(),
            "choice": asdict(c),
            "fits": plan.fits,
            "weight_bytes": plan.weights,
            "planned": plan.stages,
            "measured": {n: asdict(f) for n, f in found[-1].items()} if found else {},
            "peaks": list(map(peak, found)),
        }
        with args.json.open("a") as file:
            file.write(json.dumps(line) + "\n")


def show(plan: Plan, found: list[dict[str, Figures]]) -> None:
    """The last iteration beside the plan, and whether the peak has grown."""
    last = found[-1] if found else {}
    for name, size in plan.stages.items():
        got = last.get(name)
        compared = (
            f"{got.bytes / 1e9:8.3f} measured {size / got.bytes - 1:+7.1%} {got.seconds:8.1f} s"
            if got and got.bytes  # no reward model: nothing ran
            else ""
        )
        print(f"{name:8} {size / 1e9:8.3f} GB planned {compared}")
    if last:
        size, got_bytes = plan.peak, peak(last)
        print(
            f"{'peak':8} {size / 1e9:8.3f} GB planned {got_bytes / 1e9:8.3f} measured "
            f"{size / got_bytes - 1:+7.1%}"
        )
    if len(found) > EARLY:
        early = peak(found[EARLY - 1])
        print(
            f"iteration {EARLY}: {early:,} bytes, iteration {len(found)}: {peak(last):,} bytes "
            f"({peak(last) / early - 1:+.2%})"
        )


if __name__ == "__main__":
    main()
