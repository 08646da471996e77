"""Which options would make a better reward model? Label smoothing, centring, the share of the
blocks that learn, and the mean of the last weights, each alone.

usage: python -m bench.learning.reward_options [--only shipped smoothing ...] [--prompts N]
           [--json bench/results/reward_options.json]

Each trains on the pairs of `data/`, with the settings of the reward model that is shipped, and is
measured on the pairs of the prompts kept for that. The mean of the last quarter of the weights
(WARM, arXiv:2401.12187, averages runs; this averages steps of one) costs no training, so every
variant gets it. Differences of the loss are paired by prompt. What is done is not done again.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from bench.learning.common import earlier
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stats import mean_interval
from mlx_grpo.core.types import Parameters
from mlx_grpo.data.chat import end_of_turn
from mlx_grpo.data.pairs import PairGroup, Split, pair_count
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.reward_model import REWARD_CONFIG, RewardModel
from mlx_grpo.reward_modeling.quality import JudgedPair, judged_pairs, pair_loss, quality
from mlx_grpo.reward_modeling.train import (
    Objective,
    adapted_for_rewards,
    bradley_terry_loss,
    load_split,
    optimizer_steps,
    with_weights,
)

WEIGHTS = Path("weights/smollm2-rm")
SHIPPED = "shipped"
"""The variant that the others are compared with."""
LAST = 0.25
"""Share of the steps whose weights are averaged."""


def smoothed(scores_K: mx.array, pairs: Sequence[tuple[int, int]]) -> mx.array:
    """The loss if a label were wrong one time in ten."""
    turned = [(rejected, chosen) for chosen, rejected in pairs]
    return 0.9 * bradley_terry_loss(scores_K, pairs) + 0.1 * bradley_terry_loss(scores_K, turned)


def centred(scores_K: mx.array, pairs: Sequence[tuple[int, int]]) -> mx.array:
    """With 0.01 (chosen + rejected)^2 for each pair (Eisenstein et al. 2023, arXiv:2312.09244,
    eq. 2), which holds the scores around zero."""
    chosen, rejected = (mx.array(side) for side in zip(*pairs, strict=True))
    sums = scores_K[chosen] + scores_K[rejected]
    return bradley_terry_loss(scores_K, pairs) + 0.01 * sums.square().sum()


class Variant(NamedTuple):
    """What is changed against the shipped model."""

    objective: Objective = bradley_terry_loss
    changes: dict[str, Any] = {}


VARIANTS = {
    SHIPPED: Variant(),
    "smoothing": Variant(smoothed),
    "centring": Variant(centred),
    "8 blocks": Variant(changes={"lora_blocks": 8}),
    "all blocks": Variant(changes={"lora_blocks": 0}),
}


def by_prompt(judged: Sequence[JudgedPair]) -> list[float]:
    """Mean loss of each prompt's pairs."""
    prompts = sorted({pair.prompt for pair in judged})
    return [pair_loss([p.difference for p in judged if p.prompt == i]) for i in prompts]


def figures(model: RewardModel, groups: Sequence[PairGroup], stop: int) -> dict[str, Any]:
    """On the held-out pairs."""
    judged = judged_pairs(model, groups, stop)
    found = asdict(quality(judged))
    kept = ("pairs", "accuracy", "interval", "loss", "calibration_error", "both_ended")
    return {**{name: found[name] for name in kept}, "loss_by_prompt": by_prompt(judged)}


def trained(
    variant: Variant, config: RewardTrainConfig, backbone: Backbone, split: Split, ui: Console
) -> dict[str, Any]:
    """Figures of the last weights, and of the mean of the last ones."""
    decoder = adapted_for_rewards(replace(config, **variant.changes), backbone)
    total: Parameters = {}
    averaged = 0
    for step in optimizer_steps(config, decoder, split.train, variant.objective):
        ui.say(f"step {step.number}/{step.of}  loss {step.loss / step.pairs:.3f}")
        if step.number > (1 - LAST) * step.of:
            total = {n: w + total[n] if total else w for n, w in step.weights.items()}
            mx.eval(total)
            averaged += 1
    mean = {n: w / averaged for n, w in total.items()}
    stop = end_of_turn(backbone.tokenizer)
    return {
        name: figures(with_weights(decoder, weights), split.test, stop)
        for name, weights in (("last", step.weights), ("mean", mean))
    }


def show(found: dict[str, dict[str, Any]], ui: Console) -> None:
    """A line for each variant and its mean."""
    base = found[SHIPPED]["last"]["loss_by_prompt"]
    lines = []
    for name, which in product((n for n in VARIANTS if n in found), ("last", "mean")):
        it = found[name][which]
        more = [own - other for own, other in zip(it["loss_by_prompt"], base, strict=True)]
        low, high = mean_interval(more) if any(more) else (0.0, 0.0)
        lines.append(
            (
                name if which == "last" else f"{name}, mean of the last weights",
                f"{it['accuracy']:.1%} ({it['interval'][0]:.0%} to {it['interval'][1]:.0%})",
                f"{it['both_ended']['accuracy']:.1%}" if it["both_ended"] else "-",
                f"{it['loss']:.3f}",
                f"{statistics.fmean(more):+.3f} ({low:+.3f} to {high:+.3f})",
                f"{it['calibration_error']:.3f}",
            )
        )
    columns = ("", "accuracy (95 % interval)", "both end", "loss")
    ui.table(
        f"{it['pairs']} held-out pairs of {len(base)} prompts",
        (*columns, "loss by prompt against shipped (95 % interval)", "calibration error"),
        lines,
    )


def settings(model: str) -> RewardTrainConfig:
    """Those of the reward model that is shipped."""
    shipped = read_json(WEIGHTS / REWARD_CONFIG)["training"]
    return replace(RewardTrainConfig(**shipped), model=model, output="")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="weights/sft-4bit")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--prompts", type=int, help="train on so many, not on all")
    parser.add_argument("--json", type=Path)
    args, ui = parser.parse_args(), Console()
    try:
        config = settings(args.model)
        backbone = load_backbone(Path(config.model))
        split = load_split(config, backbone.tokenizer, ui.warn)
        split = replace(split, train=split.train[: args.prompts])
        about = {"training_pairs": pair_count(split.train), "settings": asdict(config)}
        found: dict[str, Any] = {"variants": {}, **earlier(args.json, about), **about}
        done = found["variants"]
        for name in dict.fromkeys([SHIPPED, *args.only]):
            if name not in done:
                ui.say(name)
                done[name] = trained(VARIANTS[name], config, backbone, split, ui)
                if args.json:
                    write_json(args.json, found)
    except InputError as e:
        ui.error(str(e))
        return 2
    show(done, ui)
    return 0


if __name__ == "__main__":
    sys.exit(main())
