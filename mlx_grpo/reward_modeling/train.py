"""Train a reward model on preference pairs: LoRA + scalar head on the SFT model, Bradley-Terry
loss.

L = -mean log sigmoid(r(chosen) - r(rejected))          (Bradley & Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155, eq. 1)

All answers to one prompt run together, [K, T] behind the prompt, whichever pairs they are in: each
is scored once.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.backend.device import limit_memory, recommended_memory
from mlx_grpo.backend.precision import asked, choose_precision
from mlx_grpo.config.checks import check_reward_training
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.core.dates import today
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.padding import pad_right
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import Parameters
from mlx_grpo.data.chat import end_of_turn
from mlx_grpo.data.pairs import (
    SIDES,
    PairGroup,
    Split,
    group_pairs,
    load_pairs,
    pair_count,
    split_groups,
    told,
)
from mlx_grpo.data.tables import digest
from mlx_grpo.data.template import Template
from mlx_grpo.files.atomic import atomic_directory, write_json, write_text
from mlx_grpo.files.manifest import write_manifest
from mlx_grpo.files.safetensors import save_arrays
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.backward import Pass, States, gradients
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.directory import fingerprint, parameter_count
from mlx_grpo.models.families.kernels import check_gradient
from mlx_grpo.models.lora import add_lora, lora_parameters, save_adapter, set_parameters
from mlx_grpo.models.optimizer import adamw_step, new_optimizer
from mlx_grpo.models.reward_model import (
    LEARNING_CURVE,
    REWARD_CONFIG,
    REWARD_HEAD,
    RewardModel,
    reward_decoder,
    reward_head,
)
from mlx_grpo.reward_modeling.quality import Quality, judged_pairs, pair_loss, quality, ranking

HEAD = "reward_head.weight"
SAVED = mx.bfloat16
"""What the LoRA is written in."""
Objective = Callable[[mx.array, Sequence[tuple[int, int]]], mx.array]
"""Of scores [K] and pairs (chosen, rejected): a sum over the pairs."""


@dataclass(frozen=True)
class CurvePoint:
    """A line of `learning_curve.jsonl`."""

    step: int
    pairs: int
    """Pairs trained on so far, repeated ones included."""
    train_loss: float
    """Mean over the pairs since the line before, each under the weights of its step."""
    valid_loss: float | None = None
    """Of the pairs that choose the weights, where there are any."""
    valid_accuracy: float | None = None


def bradley_terry_loss(scores_K: mx.array, pairs: Sequence[tuple[int, int]]) -> mx.array:
    """Sum of -log sigmoid(chosen - rejected) over the pairs, a scalar."""
    chosen, rejected = (mx.array(side) for side in zip(*pairs, strict=True))
    return mx.logaddexp(0.0, scores_K[rejected] - scores_K[chosen]).sum()


def group_gradients(
    decoder: Decoder,
    weight_1D: mx.array,
    group: PairGroup,
    weight: float,
    total: Parameters | None = None,
    objective: Objective = bradley_terry_loss,
) -> tuple[Parameters, float]:
    """Gradients of LoRA and head for one prompt's pairs, each pair weighted by `weight`, and the
    summed loss.

    Args:
        total: gradients to which these are added.
    """
    rows_KT, lengths = pad_right(list(group.answers))
    ends = (mx.arange(len(lengths)), mx.array(lengths) - 1)
    found: list[mx.array] = []

    def loss(last_KD: mx.array, head_1D: mx.array) -> mx.array:
        scores_K = reward_head(decoder, last_KD, head_1D, None)
        return weight * objective(scores_K, group.pairs)

    def cotangents(states: list[States]) -> list[States]:
        ((h_prompt, h_rows),) = states
        value, (g_last_KD, g_head_1D) = mx.value_and_grad(loss, argnums=(0, 1))(
            h_rows[ends], weight_1D
        )
        found.extend((value, g_head_1D))
        g_rows = mx.zeros_like(h_rows)
        g_rows[ends] = g_last_KD
        mx.eval(value, g_head_1D, g_rows)
        return [(mx.zeros_like(h_prompt), g_rows)]

    whole = [Pass(mx.array([group.prompt_ids]), rows_KT)]
    total = gradients(decoder, whole, cotangents, total)
    value, g_head_1D = found
    total[HEAD] = total[HEAD] + g_head_1D if HEAD in total else g_head_1D
    mx.eval(total[HEAD])
    return total, value.item() / weight


def batch_gradients(
    decoder: Decoder,
    weight_1D: mx.array,
    batch: Sequence[PairGroup],
    objective: Objective = bradley_terry_loss,
) -> tuple[Parameters, float]:
    """Gradients of the mean loss over the pairs of several prompts, and the summed loss."""
    weight = 1 / pair_count(batch)
    total: Parameters = {}
    loss = 0.0
    for group in batch:
        total, group_loss = group_gradients(decoder, weight_1D, group, weight, total, objective)
        loss += group_loss
    return total, loss


def train_rm(
    config: RewardTrainConfig,
    say: Callable[[str], None] = lambda _: None,
    backbone: Backbone | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Quality:
    """Train, keep the weights with the lowest held-out loss, measure, and write the directory.

    Raises:
        InputError: any of the inputs is missing or wrong, or the output directory exists.
    """
    check_reward_training(config)
    config = replace(config, template_date=config.template_date or today())
    with atomic_directory(Path(config.output)) as directory:
        backbone = backbone or _load(config)
        if backbone.note:
            warn(backbone.note)
        split = load_split(config, backbone.tokenizer, warn)
        say("  ".join(f"{name}: {_counted(side)}" for name, side in vars(split).items()))
        model, curve = _fit(config, backbone, split, say)
        _round(model.decoder.model)  # before it is measured: the figures are of what is saved
        measured = quality(judged_pairs(model, split.test, end_of_turn(backbone.tokenizer)))
        save_adapter(directory, model.decoder.model, SAVED)
        save_arrays(directory / REWARD_HEAD, {"weight": model.weight_1D})
        lines = (json.dumps(asdict(point)) + "\n" for point in curve)
        write_text(directory / LEARNING_CURVE, "".join(lines))
        write_json(
            directory / REWARD_CONFIG,
            {
                "kind": "adapter",
                "pooling": "last_token",
                "input": "policy_token_ids",
                "backbone_fingerprint": fingerprint(backbone.path),
                "temperature": measured.temperature,
                "held_out": asdict(measured),
                "training": asdict(config),
                "pairs_sha256": digest(Path(config.pairs)),
            },
        )
        write_manifest(directory)
    return measured


def _round(adapted: nn.Module) -> None:
    """The adapter's values, in place, to those that its file will hold."""
    whole = lora_parameters(adapted)
    set_parameters(adapted, {n: v.astype(SAVED).astype(v.dtype) for n, v in whole.items()})


def load_split(
    config: RewardTrainConfig, tokenizer: Any, warn: Callable[[str], None] = lambda _: None
) -> Split:
    """Prompts to train on, to choose by and to measure on; `warn` gets what was left out.

    Raises:
        InputError: see `load_pairs` and `split_groups`.
    """
    columns = {side: getattr(config, f"{side}_column") for side in ("prompt", *SIDES)}
    pairs, skipped = load_pairs(Path(config.pairs), tokenizer, config.max_length, columns)
    if skipped:
        warn(f"{config.pairs}: pairs skipped: {told(skipped)}")
    fractions = config.valid_fraction, config.test_fraction
    return split_groups(group_pairs(pairs), *fractions, config.seed)


def _load(config: RewardTrainConfig) -> Backbone:
    path = Path(config.model)
    limit_memory(recommended_memory(), 0)
    precision = choose_precision(parameter_count(path), asked(config.precision, config.weights))
    return load_backbone(path, precision, Template(config.template_date))


def _counted(groups: Sequence[PairGroup]) -> str:
    return f"{pair_count(groups)} pairs of {len(groups)} prompts"


@dataclass(frozen=True)
class Step:
    """An optimizer step that was taken."""

    number: int
    """The first is 1."""
    of: int
    weights: Parameters
    """LoRA and head after it."""
    loss: float
    """Summed over its pairs, under the weights before it."""
    pairs: int


def adapted_for_rewards(config: RewardTrainConfig, backbone: Backbone) -> Decoder:
    """A new LoRA on the blocks that `config` names."""
    check_gradient(backbone.model)
    adapted = add_lora(
        backbone.model,
        config.lora_rank,
        config.lora_scale,
        config.seed,
        config.lora_blocks,
        config.expert_lora_rank,
    )
    adapted.train()
    return reward_decoder(adapted)


def optimizer_steps(
    config: RewardTrainConfig,
    decoder: Decoder,
    groups: Sequence[PairGroup],
    objective: Objective = bradley_terry_loss,
) -> Iterator[Step]:
    """Train on these prompts, `config.epochs` times; `decoder` holds each step's weights.

    Raises:
        InputError: the gradient is not finite.
    """
    optimizer = new_optimizer(config.learning_rate, config.weight_decay)
    weights = {**lora_parameters(decoder.model), HEAD: mx.zeros((1, decoder.hidden_size))}
    batches = list(_batches(config, groups))
    for number, batch in enumerate(batches, 1):
        found, loss = batch_gradients(decoder, weights[HEAD], batch, objective)
        done = (number - 1) * config.batch_size / (config.epochs * len(groups))
        optimizer.learning_rate = config.learning_rate * (1 - done)
        weights, norm = adamw_step(optimizer, found, weights, config.max_grad_norm)
        if not math.isfinite(norm):
            raise InputError(f"{config.pairs}: the gradient is not finite; lower --learning-rate")
        _set_lora(decoder, weights)
        yield Step(number, len(batches), weights, loss, pair_count(batch))


def with_weights(decoder: Decoder, weights: Parameters) -> RewardModel:
    """The reward model of a step, whose LoRA `decoder` gets."""
    _set_lora(decoder, weights)
    return RewardModel(decoder, weights[HEAD], None, None)


def _set_lora(decoder: Decoder, weights: Parameters) -> None:
    set_parameters(decoder.model, {n: v for n, v in weights.items() if n != HEAD})


def _fit(
    config: RewardTrainConfig, backbone: Backbone, split: Split, say: Callable[[str], None]
) -> tuple[RewardModel, list[CurvePoint]]:
    """The model with the lowest loss on `split.valid` (without any: the last), and the curve."""
    decoder = adapted_for_rewards(config, backbone)
    best: Parameters = {}
    lowest, best_step = math.inf, 0
    curve: list[CurvePoint] = []
    stop = end_of_turn(backbone.tokenizer)
    loss, pairs, seen = 0.0, 0, 0  # pairs and their summed loss since the last evaluation
    for step in optimizer_steps(config, decoder, split.train):
        loss, pairs = loss + step.loss, pairs + step.pairs
        if step.number % config.eval_every and step.number < step.of:
            continue
        seen += pairs
        point = CurvePoint(step.number, seen, loss / pairs)
        if split.valid:
            now = RewardModel(decoder, step.weights[HEAD], None, None)
            judged = judged_pairs(now, split.valid, stop)
            point = replace(
                point,
                valid_loss=pair_loss([p.difference for p in judged]),
                valid_accuracy=ranking(judged).accuracy,
            )
        curve.append(point)
        if point.valid_loss is None or point.valid_loss < lowest:
            best, best_step = step.weights, step.number
            lowest = math.inf if point.valid_loss is None else point.valid_loss
        say(_line(point, step.of, step.number == best_step))
        loss, pairs = 0.0, 0
        if config.patience and step.number - best_step >= config.patience * config.eval_every:
            say(f"no lower held-out loss for {config.patience} evaluations; the best are kept")
            break
    return with_weights(decoder, best), curve


def _batches(config: RewardTrainConfig, groups: Sequence[PairGroup]) -> Iterator[list[PairGroup]]:
    """Prompts of each optimizer step: the epochs' orders end to end."""
    visits = [
        i
        for epoch in range(config.epochs)
        for i in permutation(config.seed, "pairs", epoch, n=len(groups))
    ]
    for start in range(0, len(visits), config.batch_size):
        yield [groups[i] for i in visits[start : start + config.batch_size]]


def _line(point: CurvePoint, steps: int, best: bool) -> str:
    text = f"step {point.step}/{steps}  {point.pairs} pairs  loss {point.train_loss:.4f}"
    if point.valid_loss is None:
        return text
    held_out = f"held-out loss {point.valid_loss:.4f}  accuracy {point.valid_accuracy:.1%}"
    return f"{text}  {held_out}{'  -> best' if best else ''}"
