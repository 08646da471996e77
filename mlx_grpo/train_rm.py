"""Train a reward model on preference pairs: LoRA + scalar head on the SFT model, Bradley-Terry
loss.

L = -mean log sigmoid(r(chosen) - r(rejected))          (Bradley & Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155, eq. 1)

All answers to one prompt run together, [K, T] behind the prompt, whichever pairs they are in: each
is scored once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlx_grpo.config import RewardTrainConfig, check_ranges
from mlx_grpo.data import load_pairs
from mlx_grpo.errors import InputError
from mlx_grpo.files import atomic_directory, write_json, write_manifest
from mlx_grpo.models import backward
from mlx_grpo.models.backbone import Backbone, fingerprint, load_backbone
from mlx_grpo.models.lora import (
    Parameters,
    add_lora,
    lora_parameters,
    save_adapter,
    save_arrays,
    set_parameters,
)
from mlx_grpo.models.reward_model import (
    REWARD_CONFIG,
    REWARD_HEAD,
    RewardModel,
    reward_head,
)
from mlx_grpo.models.stages import Stages
from mlx_grpo.padding import pad_right
from mlx_grpo.rng import permutation
from mlx_grpo.types import PreferencePair
from mlx_grpo.update import adamw_step, new_optimizer

CALIBRATION_BINS = 10
HEAD = "reward_head.weight"


@dataclass(frozen=True)
class PairGroup:
    """All pairs of one prompt: distinct answers, and which beats which."""

    prompt_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    """(index of chosen, index of rejected)."""


@dataclass(frozen=True)
class Quality:
    """Held-out quality of a reward model."""

    accuracy: float
    """Share of pairs ranked as labelled."""
    calibration_error: float
    """Expected calibration error of max(p, 1 - p), p = sigmoid(score difference), equal-width
    bins."""
    loss: float
    pairs: int
    shorter_wins: float
    """Share of pairs whose shorter answer is the chosen one: what a rule without a model would get
    right."""


def group_pairs(pairs: Sequence[PreferencePair]) -> list[PairGroup]:
    """Gather pairs by prompt, in the order of first appearance."""
    by_prompt: dict[tuple[int, ...], list[PreferencePair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_ids, []).append(pair)
    groups = []
    for prompt_ids, members in by_prompt.items():
        answers: dict[tuple[int, ...], int] = {}
        for pair in members:
            for ids in (pair.chosen_ids, pair.rejected_ids):
                answers.setdefault(ids, len(answers))
        indices = tuple((answers[p.chosen_ids], answers[p.rejected_ids]) for p in members)
        groups.append(PairGroup(prompt_ids, tuple(answers), indices))
    return groups


def bradley_terry_loss(scores_K: mx.array, pairs: Sequence[tuple[int, int]]) -> mx.array:
    """Sum of -log sigmoid(chosen - rejected) over the pairs, a scalar."""
    chosen, rejected = (mx.array(side) for side in zip(*pairs, strict=True))
    return mx.logaddexp(0.0, scores_K[rejected] - scores_K[chosen]).sum()


def group_gradients(
    stages: Stages, weight_1D: mx.array, group: PairGroup, weight: float
) -> tuple[Parameters, float]:
    """Gradients of LoRA and head for one prompt's pairs, each pair weighted by `weight`, and the
    summed loss."""
    rows_KT, lengths = pad_right(list(group.answers))
    trace = backward.forward(stages, mx.array([group.prompt_ids]), rows_KT)
    ends = (mx.arange(len(lengths)), mx.array(lengths) - 1)

    def loss(last_KD: mx.array, head_1D: mx.array) -> mx.array:
        return weight * bradley_terry_loss(reward_head(stages, last_KD, head_1D, None), group.pairs)

    value, (g_last_KD, g_head_1D) = mx.value_and_grad(loss, argnums=(0, 1))(
        trace.h_rows[ends], weight_1D
    )
    g_rows = mx.zeros_like(trace.h_rows)
    g_rows[ends] = g_last_KD
    gradients = backward.backward(stages, trace, mx.zeros_like(trace.h_prompt), g_rows)
    mx.eval(g_head_1D)
    return {**gradients, HEAD: g_head_1D}, value.item() / weight


def calibration_error(probabilities: Sequence[float], bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3) of p(chosen wins),
    folded to [0.5, 1]."""
    sums = [[0.0, 0.0, 0] for _ in range(bins)]
    for p in probabilities:
        confidence = max(p, 1 - p)
        slot = sums[min(int((confidence - 0.5) * 2 * bins), bins - 1)]
        slot[0] += confidence
        slot[1] += 1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0
        slot[2] += 1
    return sum(abs(right - confidence) for confidence, right, n in sums if n) / len(probabilities)


def measure(model: RewardModel, groups: Sequence[PairGroup]) -> Quality:
    """Quality on held-out pairs."""
    differences, shorter = [], 0.0
    for group in groups:
        scores = model.score_ids(group.prompt_ids, list(group.answers))
        for chosen, rejected in group.pairs:
            differences.append(scores[chosen] - scores[rejected])
            lengths = len(group.answers[chosen]), len(group.answers[rejected])
            shorter += 1.0 if lengths[0] < lengths[1] else 0.5 if lengths[0] == lengths[1] else 0.0
    count = len(differences)
    probabilities = [1 / (1 + math.exp(-d)) if d > -700 else 0.0 for d in differences]
    return Quality(
        accuracy=sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / count,
        calibration_error=calibration_error(probabilities),
        loss=sum(math.log1p(math.exp(-abs(d))) + max(-d, 0.0) for d in differences) / count,
        pairs=count,
        shorter_wins=shorter / count,
    )


def train_rm(
    config: RewardTrainConfig,
    say: Callable[[str], None] = lambda _: None,
    backbone: Backbone | None = None,
) -> Quality:
    """Train, measure on the held-out pairs, and write the directory.

    Raises:
        InputError: any of the inputs is missing or wrong, or the output directory exists.
    """
    check_ranges(config)
    with atomic_directory(Path(config.output)) as directory:
        backbone = backbone or load_backbone(Path(config.model))
        pairs, too_long = load_pairs(Path(config.pairs), backbone.tokenizer, config.max_length)
        if too_long:
            say(
                f"{config.pairs}: {too_long} pairs longer than {config.max_length} tokens are "
                "skipped"
            )
        train_groups, valid_groups = split(group_pairs(pairs), config.valid_fraction, config.seed)
        count = sum(len(g.pairs) for g in train_groups)
        say(
            f"training on {count} pairs of {len(train_groups)} prompts, {len(valid_groups)} "
            "prompts held out"
        )
        model = _fit(config, backbone, train_groups, say)
        quality = measure(model, valid_groups)
        save_adapter(directory, model.stages.model, mx.bfloat16)
        save_arrays(directory / REWARD_HEAD, {"weight": model.weight_1D})
        write_json(
            directory / REWARD_CONFIG,
            {
                "kind": "adapter",
                "pooling": "last_token",
                "input": "policy_token_ids",
                "backbone_fingerprint": fingerprint(backbone.path),
                "held_out": asdict(quality),
                "training": asdict(config),
            },
        )
        write_manifest(directory)
    return quality


def split(
    groups: list[PairGroup], fraction: float, seed: int
) -> tuple[list[PairGroup], list[PairGroup]]:
    """Hold out a share of the prompts, at least one."""
    held_out = max(1, round(fraction * len(groups)))
    if held_out >= len(groups):
        raise InputError(
            f"pairs of {len(groups)} prompts leave none to train on with --valid-fraction "
            f"{fraction:g}; give more prompts or hold out fewer"
        )
    shuffled = [groups[i] for i in permutation(seed, "split", n=len(groups))]
    return shuffled[held_out:], shuffled[:held_out]


def _fit(
    config: RewardTrainConfig,
    backbone: Backbone,
    groups: list[PairGroup],
    say: Callable[[str], None],
) -> RewardModel:
    adapted = add_lora(
        backbone.model, config.lora_rank, config.lora_scale, config.seed, config.lora_blocks
    )
    adapted.train()
    stages = Stages(adapted)
    weight_1D = mx.zeros((1, stages.hidden_size))
    optimizer = new_optimizer(config.learning_rate, config.weight_decay)
    visits = [
        i
        for epoch in range(config.epochs)
        for i in permutation(config.seed, "pairs", epoch, n=len(groups))
    ]
    recent: list[float] = []
    for start in range(0, len(visits), config.batch_size):
        batch = [groups[i] for i in visits[start : start + config.batch_size]]
        count = sum(len(g.pairs) for g in batch)
        total: Parameters = {}
        for group in batch:
            gradients, loss = group_gradients(stages, weight_1D, group, 1 / count)
            total = {n: total[n] + g for n, g in gradients.items()} if total else gradients
            mx.eval(total)
            recent.append(loss / len(group.pairs))
        optimizer.learning_rate = config.learning_rate * (1 - start / len(visits))
        current = {**lora_parameters(adapted), HEAD: weight_1D}
        updated, norm = adamw_step(optimizer, total, current, config.max_grad_norm)
        if not math.isfinite(norm):
            raise InputError(f"{config.pairs}: the gradient is not finite; lower --learning-rate")
        weight_1D = updated.pop(HEAD)
        set_parameters(adapted, updated)
        if (start // config.batch_size) % 10 == 9:
            say(f"{start + len(batch)}/{len(visits)} prompts  loss {sum(recent) / len(recent):.4f}")
            recent = []
    return RewardModel(stages, weight_1D, None, None)
