"""Source checkpoints to verified MLX directories; a directory is complete or absent.

`convert_sft` and `convert_rm` each write one directory and return the row of the table that says
what it cost. The way of the data: `source` finds out what is there, `opened` reads it lazily,
`weights` streams it into its final form, `quality` measures what that changed, `card` writes it
down.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.convert.adapters import attach
from mlx_grpo.convert.card import USE_RM, USE_SFT, model_card
from mlx_grpo.convert.cost import (
    QuantizationCost,
    check_pairs,
    check_texts,
    policy_cost,
    reward_cost,
)
from mlx_grpo.convert.quantize import (
    Quantization,
    bits_per_weight,
    first_difference,
    quantized_config,
    stream,
    write_weights,
)
from mlx_grpo.convert.reader import OpenedSource, open_source
from mlx_grpo.convert.source import Source, locate
from mlx_grpo.convert.tokenizer import check_tokenizer
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import load_chat_tokenizer
from mlx_grpo.files.atomic import atomic_directory, read_json, write_json, write_text
from mlx_grpo.files.manifest import verify_manifest, write_manifest
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.directory import fingerprint, parameter_count, weight_files
from mlx_grpo.models.lora import load_adapter, lora_parameters, save_adapter
from mlx_grpo.models.reward_model import (
    LEARNING_CURVE,
    REWARD_CONFIG,
    REWARD_HEAD,
    check_fingerprint,
)

__all__ = [
    "Converted",
    "Quantization",
    "RewardForm",
    "check_pairs",
    "check_sources",
    "check_texts",
    "convert_rm",
    "convert_sft",
    "locate",
]

RewardForm = Literal["auto", "full", "adapter"]


@dataclass(frozen=True)
class Converted:
    """One line of the conversion table."""

    path: Path
    form: str
    """`model` or `adapter`."""
    parameters: int
    bits_per_weight: float
    bytes: int
    cost: QuantizationCost
    """What quantization changed; or that the source's own values were kept."""


def convert_sft(
    source: Source,
    out: Path,
    target: Quantization,
    texts: Path | None,
    base: str | None = None,
    replace: bool = False,
) -> Converted:
    """Convert a causal language model to `out`, a directory `mlx_lm.load` reads.

    Args:
        texts: prompts with `response`, on which the cost of quantization is measured; None to skip.
        base: the model an adapter belongs to, where it does not say so itself.

    Raises:
        InputError: the source is unreadable, of another kind, or `out` exists and `replace` is
            false.
    """
    with _opened(source, base) as opened, _writing(out, replace, source) as directory:
        _check_role(opened, wants_head=False)
        _write_model(opened, directory, target)
        cost = QuantizationCost(kept=_kept(opened, target))
        if texts and not cost.kept:
            tokenizer = load_chat_tokenizer(directory)
            cost = policy_cost(opened.model, _lazily(directory), tokenizer, texts)
        return _finish(opened, directory, out, "model", cost, USE_SFT)


def convert_rm(
    source: Source,
    out: Path,
    sft: Path,
    target: Quantization,
    pairs: Path | None,
    form: RewardForm = "auto",
    base: str | None = None,
    replace: bool = False,
) -> Converted:
    """Convert a reward model to `out`, a directory `load_reward_model` reads.

    A reward model whose backbone, once converted, is the model in `sft` is written as an adapter
    that shares it; any other as a model of its own.

    Args:
        sft: the converted SFT model; need not exist.
        pairs: preference pairs on which the cost of quantization is measured; None to skip.
        form: `adapter` and `full` insist on one of the two.

    Raises:
        InputError: the source is unreadable, has another number of labels than one, does not fit
            the SFT model where it must, or `out` exists.
    """
    own = read_json(source.path / REWARD_CONFIG) if (source.path / REWARD_CONFIG).is_file() else {}
    if own.get("kind") == "adapter":
        check_fingerprint(source.path / REWARD_CONFIG, own, sft)
        base = str(sft)
    with _opened(source, base) as opened, _writing(out, replace, source) as directory:
        _check_role(opened, wants_head=True)
        about = _about(opened, own)
        own_adapter = own.get("kind") == "adapter"
        as_adapter = form != "full" and (own_adapter or _shares(opened, sft, form == "adapter"))
        save_arrays(directory / REWARD_HEAD, opened.head)
        if as_adapter:
            _write_adapter(opened, directory, sft)
            about |= {"kind": "adapter", "backbone_fingerprint": fingerprint(sft)}
        else:
            _write_model(opened, directory, target)
            about |= {"kind": "full"}
        write_json(directory / REWARD_CONFIG, about)
        if (source.path / LEARNING_CURVE).is_file():
            shutil.copyfile(source.path / LEARNING_CURVE, directory / LEARNING_CURVE)
        # an adapter made on these very weights, or weights that were not touched
        kept = own_adapter if as_adapter else _kept(opened, target)
        cost = QuantizationCost(kept=kept)
        if pairs and not kept:
            after = _lazily(sft, directory) if as_adapter else _lazily(directory)
            tokenizer, padding = load_chat_tokenizer(directory), about.get("padding_token_id")
            cost = reward_cost(opened.model, after, opened.head, tokenizer, padding, pairs)
        kind = "adapter" if as_adapter else "model"
        return _finish(opened, directory, out, kind, cost, USE_RM)


def check_sources(
    sft: Source | None, rm: Source | None, bases: tuple[str | None, str | None], outs: list[Path]
) -> None:
    """Look at both sources, before the first is converted.

    Args:
        bases: of the SFT adapter and of the reward adapter, where they are named.
        outs: directories that must not be there yet.

    Raises:
        InputError: a source is unreadable or in the other's place, or a directory is there.
    """
    for out in outs:
        if out.exists():
            raise InputError(f"{out}: already exists; replace it with --force, or choose --output")
    if sft:
        with _opened(sft, bases[0]) as opened:
            _check_role(opened, wants_head=False)
    if rm and not (rm.path / REWARD_CONFIG).is_file():
        with _opened(rm, bases[1]) as opened:
            _check_role(opened, wants_head=True)


def _check_role(opened: OpenedSource, wants_head: bool) -> None:
    path = opened.source.path
    if opened.head and not wants_head:
        raise InputError(f"{path}: this is a reward model; give it as --rm")
    if wants_head and not opened.head:
        raise InputError(
            f"{path}: not a reward model; give a *ForSequenceClassification with one label, a "
            f"model or LoRA adapter with {REWARD_HEAD}, or the output of 'mlx-grpo train-rm'"
        )


@contextmanager
def _opened(source: Source, base: str | None) -> Iterator[OpenedSource]:
    verify_manifest(source.path)  # of a directory that was written here
    with tempfile.TemporaryDirectory(prefix="mlx-grpo-") as scratch:
        yield open_source(source, base, Path(scratch))


@contextmanager
def _writing(out: Path, replace: bool, source: Source) -> Iterator[Path]:
    """The unfinished output; complaints about it name the source instead."""
    with atomic_directory(out, replace=replace) as directory:
        try:
            yield directory
        except InputError as e:
            raise InputError(str(e).replace(str(directory), str(source.path))) from e


def _kept(opened: OpenedSource, target: Quantization) -> bool:
    """Whether no value changes: quantized already, or 16 bits wanted and there."""
    if opened.loras:
        return False
    wide = (mx.float32, mx.float64)
    in_16_bits = all(v.dtype not in wide for v in opened.tensors().arrays.values())
    return opened.quantized or (target.bits == 16 and in_16_bits)


def _write_model(opened: OpenedSource, directory: Path, target: Quantization) -> None:
    model = opened.model()
    config = quantized_config(opened, model, target)
    write_json(directory / "config.json", config)  # the tokenizer's class depends on it
    opened.write_tokenizer(directory)
    check_tokenizer(directory, _embedding_rows(model))  # before the long work
    write_weights(directory, stream(model, config, opened))
    _lazily(directory)()  # every tensor is in its place


def _write_adapter(opened: OpenedSource, directory: Path, sft: Path) -> None:
    model = _lazily(sft)()
    adapted = attach(model, opened.loras or {}, opened.source.path)
    values = lora_parameters(adapted).values()
    lossless = all((v.astype(mx.bfloat16) == v).all().item() for v in values)
    save_adapter(directory, adapted, mx.bfloat16 if lossless else None)
    opened.write_tokenizer(directory)
    check_tokenizer(directory, _embedding_rows(model))
    load_adapter(model, directory)


def _embedding_rows(model: nn.Module) -> int:
    kinds = nn.Embedding | nn.QuantizedEmbedding
    return next(m.weight.shape[0] for _, m in model.named_modules() if isinstance(m, kinds))


def _lazily(directory: Path, adapter: Path | None = None) -> Callable[[], nn.Module]:
    """Opens a converted directory, with an adapter on top, as often as it is asked."""

    def open_model() -> nn.Module:
        model = open_source(locate(str(directory)), None, directory).backbone()
        return load_adapter(model, adapter) if adapter else model

    return open_model


def _about(opened: OpenedSource, own: dict[str, Any]) -> dict[str, Any]:
    """What reward_model.json says beside the kind."""
    if own:
        return {n: v for n, v in own.items() if n not in ("kind", "backbone_fingerprint")}
    padding = opened.config.get("pad_token_id")
    return {
        "input": "chat_template",
        "pooling": "last_token" if padding is None else "last_token_that_is_not_padding",
        **({} if padding is None else {"padding_token_id": padding}),
    }


def _shares(opened: OpenedSource, sft: Path, insist: bool) -> bool:
    """Whether the reward model's backbone, converted as the SFT model was, is the SFT model."""
    if not (sft / "config.json").is_file():
        if insist:
            raise InputError(f"{sft}: no SFT model here; convert it first, or use --rm-as full")
        return False
    config = read_json(sft / "config.json")
    model = opened.backbone()
    different = first_difference(stream(model, config, opened), sft)
    if different and insist:
        raise InputError(
            f"{opened.source.path}: layer '{different.rpartition('.')[0]}' differs from that of "
            f"{sft}, so they cannot share a backbone; use --rm-as full"
        )
    return different is None


def _finish(
    opened: OpenedSource, directory: Path, out: Path, form: str, cost: QuantizationCost, usage: str
) -> Converted:
    """Count, write the model card, return the row of the table."""
    if form == "model":
        files, count = weight_files(directory), parameter_count(directory)
        bits = bits_per_weight(directory, count)
    else:
        files = [directory / "adapters.safetensors"]
        arrays = load_arrays(files[0]).values()
        count = sum(a.size for a in arrays)
        bits = 8 * sum(a.nbytes for a in arrays) / count
    size = sum(f.stat().st_size for f in files)
    row = Converted(out, form, count, bits, size, cost)
    table = [
        ("parameters", f"{count:,}"),
        ("bits per weight", f"{bits:.2f}"),
        ("size", f"{size / 1e6:,.2f} MB"),
        ("what it cost", cost.describe()),
    ]
    write_manifest(directory)  # before the card, which people edit
    write_text(
        directory / "README.md",
        model_card(opened, out.name, table, usage.format(command(out.name))),
    )
    return row
