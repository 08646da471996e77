"""Source checkpoints to verified MLX directories; a directory is complete or absent.

`convert_sft` and `convert_rm` each write one directory and return the row of the table that says
what it cost.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.convert.quality import Cost, check_texts, pair_cost, policy_cost
from mlx_grpo.convert.source import Source, locate
from mlx_grpo.convert.weights import (
    Quantization,
    bits_per_weight,
    check_finite,
    load_source,
    model_from,
    quantize,
    write_model,
)
from mlx_grpo.errors import InputError
from mlx_grpo.files import atomic_directory, read_json, write_json
from mlx_grpo.models.backbone import (
    fingerprint,
    load_backbone,
    parameter_count,
    rope_fields,
    weight_files,
)
from mlx_grpo.models.lora import load_adapter, load_arrays, save_arrays
from mlx_grpo.models.reward_model import (
    REWARD_CONFIG,
    REWARD_HEAD,
    check_fingerprint,
    load_head,
    load_reward_model,
)

__all__ = ["Converted", "Quantization", "check_texts", "convert_rm", "convert_sft", "locate"]

ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json", REWARD_HEAD)


@dataclass(frozen=True)
class Converted:
    """One line of the conversion table."""

    path: Path
    parameters: int
    bits_per_weight: float
    bytes: int
    cost: Cost
    """What quantization changed; or that the source's own values were kept."""


def convert_sft(
    source: Source, out: Path, target: Quantization, texts: Path | None, replace: bool = False
) -> Converted:
    """Convert a causal language model to `out`, a directory `mlx_lm.load` reads.

    Args:
        texts: prompts with `response`, on which the cost of quantization is measured; None to skip.

    Raises:
        InputError: the source is unreadable, of another kind, or `out` exists and `replace` is
            false.
    """
    if source.kind not in ("causal-lm", "gguf"):
        raise InputError(f"{source.path}: this is a reward model; give it as --rm")
    with atomic_directory(out, replace=replace) as directory, _blaming(source, directory):
        model, config = load_source(source)
        check_finite(model, source)
        kept = "quantization" in config or target.bits == 16
        config = quantize(model, config, target)
        write_model(directory, source, model, config)
        del model
        load_backbone(directory)  # verify: it loads, and its tokenizer has a chat template
        cost = Cost(kept=kept)
        if texts and not kept:
            cost = policy_cost(load_source(source)[0], directory, texts)
        row = _row(directory, out, cost)
    return row


def convert_rm(
    source: Source,
    out: Path,
    sft: Path,
    target: Quantization,
    pairs: Path | None,
    replace: bool = False,
) -> Converted:
    """Convert a reward model to `out`, a directory `load_reward_model` reads.

    Raises:
        InputError: the source is unreadable, has another number of labels than one, or `out`
            exists.
    """
    if source.kind == "reward-adapter":
        return _convert_reward_adapter(source, out, sft, replace)
    if source.kind == "reward-full":
        return _keep_full(source, out, replace)
    if source.kind != "sequence-classification":
        raise InputError(
            f"{source.path}: not a reward model; give a *ForSequenceClassification directory "
            "with one label, "
            "or the output of 'mlx-grpo train-rm'"
        )
    _one_label(source)
    with atomic_directory(out, replace=replace) as directory, _blaming(source, directory):
        backbone, head = _split_head(source)
        config = {**source.config, **rope_fields(source.config), "tie_word_embeddings": True}
        try:
            model = model_from(config, backbone)
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{source.path}: {' '.join(str(e).split())[:240]}") from e
        check_finite(model, source)
        quantized = quantize(model, config, target)
        write_model(directory, source, model, quantized)
        save_arrays(directory / REWARD_HEAD, head)
        load_head(directory / REWARD_HEAD)
        about = {"kind": "full", "pooling": "last_token", "input": "chat_template"}
        write_json(directory / REWARD_CONFIG, about)
        del model
        load_backbone(directory)
        kept = quantized is config
        cost = Cost(kept=kept)
        if pairs and not kept:
            cost = pair_cost(backbone, config, head, directory, pairs)
        row = _row(directory, out, cost)
    return row


@contextmanager
def _blaming(source: Source, directory: Path) -> Iterator[None]:
    """Complaints about the unfinished output name the source instead."""
    try:
        yield
    except InputError as e:
        raise InputError(str(e).replace(str(directory), str(source.path))) from e


def _one_label(source: Source) -> None:
    config = source.config
    labels = config.get("num_labels", len(config.get("id2label") or {0: 0, 1: 1}))
    if labels != 1:
        raise InputError(
            f"{source.path}/config.json: the classifier has {labels} labels, a reward model has "
            "one "
            "(num_labels=1)"
        )


def _split_head(source: Source) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    weights: dict[str, mx.array] = {}
    for file in weight_files(source.path):
        weights |= load_arrays(file)
    if not weights:
        raise InputError(
            f"{source.path}: no model*.safetensors; save the model with safe_serialization=True"
        )
    if "score.weight" not in weights:
        raise InputError(
            f"{source.path}: tensor 'score.weight' is missing; this has no reward head"
        )
    head = {
        n: weights.pop(f"score.{n}").astype(mx.float32)
        for n in ("weight", "bias")
        if f"score.{n}" in weights
    }
    if head["weight"].shape[0] != 1:
        raise InputError(
            f"{source.path}: tensor 'score.weight' has {head['weight'].shape[0]} rows, "
            "a reward model has one"
        )
    if head["weight"].shape[1] != source.config.get("hidden_size"):
        raise InputError(
            f"{source.path}: tensor 'score.weight' has width {head['weight'].shape[1]}, "
            f"the model has hidden_size {source.config.get('hidden_size')}"
        )
    for name, value in head.items():
        if not mx.isfinite(value).all().item():
            raise InputError(f"{source.path}: tensor 'score.{name}' holds values not finite")
    return weights, head


def _convert_reward_adapter(source: Source, out: Path, sft: Path, replace: bool) -> Converted:
    check_fingerprint(source.path / REWARD_CONFIG, source.config, sft)
    with atomic_directory(out, replace=replace) as directory, _blaming(source, directory):
        backbone = load_backbone(sft)
        load_adapter(backbone.model, source.path)  # verify every tensor against the backbone
        load_head(source.path / REWARD_HEAD)
        for name in ADAPTER_FILES:
            shutil.copyfile(source.path / name, directory / name)
        config: dict[str, Any] = read_json(source.path / REWARD_CONFIG)
        write_json(directory / REWARD_CONFIG, {**config, "backbone_fingerprint": fingerprint(sft)})
        arrays = load_arrays(directory / "adapters.safetensors")
        size = (directory / "adapters.safetensors").stat().st_size
        count = sum(a.size for a in arrays.values())
    return Converted(out, count, 8 * size / count, size, Cost(kept=True))


def _keep_full(source: Source, out: Path, replace: bool) -> Converted:
    """A full reward model of this project's own: verified and kept."""
    with atomic_directory(out, replace=replace) as directory:
        load_reward_model(source.path, load_backbone(source.path))
        shutil.copytree(source.path, directory, dirs_exist_ok=True)
        row = _row(directory, out, Cost(kept=True))
    return row


def _row(directory: Path, out: Path, cost: Cost) -> Converted:
    count = parameter_count(directory)
    size = sum(f.stat().st_size for f in weight_files(directory))
    return Converted(out, count, bits_per_weight(directory, count), size, cost)
