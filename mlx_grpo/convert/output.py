"""The directory of a converted model: written piece by piece, complete or absent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.backend.own_dtypes import may_cast
from mlx_grpo.backend.precision import choose_precision
from mlx_grpo.convert.adapters import attach
from mlx_grpo.convert.card import model_card
from mlx_grpo.convert.cost import QuantizationCost
from mlx_grpo.convert.original import Agreement
from mlx_grpo.convert.quantize import (
    Quantization,
    bits_per_weight,
    quantized_config,
    stream,
    write_weights,
)
from mlx_grpo.convert.reader import OpenedSource, open_source
from mlx_grpo.convert.source import Source, locate
from mlx_grpo.convert.tokenizer import check_tokenizer
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import atomic_directory, read_json, write_json, write_text
from mlx_grpo.files.manifest import write_manifest
from mlx_grpo.files.safetensors import load_arrays
from mlx_grpo.models.block_reader import cast_around_blocks
from mlx_grpo.models.check import check_streamed
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.directory import EXACT_UP_TO, parameter_count, weight_files
from mlx_grpo.models.lora import load_adapter, lora_parameters, save_adapter


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
    agreement: Agreement = field(default_factory=Agreement)
    """The source in PyTorch against the source in MLX."""
    notes: tuple[str, ...] = ()
    """What to know before using it, a line each."""


@contextmanager
def writing(out: Path, replace: bool, source: Source) -> Iterator[Path]:
    """The unfinished output; complaints about it name the source instead."""
    with atomic_directory(out, replace=replace) as directory:
        try:
            yield directory
        except InputError as e:
            raise InputError(str(e).replace(str(directory), str(source.path))) from e


def keeps_values(opened: OpenedSource, target: Quantization) -> bool:
    """Whether no value changes: quantized already, or 16 bits wanted and there."""
    if opened.loras:
        return False
    wide, castable = (mx.float32, mx.float64), may_cast(opened.backbone())
    arrays = opened.tensors().arrays.items()
    in_16_bits = all(v.dtype not in wide or not castable(n) for n, v in arrays)
    return opened.quantized or (target.bits == 16 and in_16_bits)


def write_about(
    opened: OpenedSource, directory: Path, target: Quantization, exact_up_to: int | None
) -> tuple[str, ...]:
    """Configuration and tokenizer, before the long work; returns what to know of them.

    Args:
        exact_up_to: tokens from which on mlx-lm computes another model; training checks it.
    """
    model = opened.model()
    config = {n: v for n, v in quantized_config(opened, model, target).items() if n != EXACT_UP_TO}
    if exact_up_to is not None:
        config[EXACT_UP_TO] = exact_up_to
    write_json(directory / "config.json", config)  # the tokenizer's class depends on it
    opened.write_tokenizer(directory)
    return check_tokenizer(directory, _embedding_rows(model))


def write_model(opened: OpenedSource, directory: Path) -> None:
    """The weights; what was written is read again and compared with itself taken apart.

    Raises:
        InputError: it does not compute the same.
    """
    config = read_json(directory / "config.json")
    write_weights(directory, stream(opened.model(), config, opened))
    open_model, precision = lazily(directory), choose_precision(0)

    def written() -> Decoder:
        return cast_around_blocks(Decoder(open_model()), precision.dtype)

    try:
        check_streamed(written, precision)  # and every tensor is in its place
    except InputError as e:
        raise InputError(f"{opened.source.path}: {e}") from e


def write_adapter(opened: OpenedSource, directory: Path, sft: Path) -> None:
    model = lazily(sft)()
    adapted = attach(model, opened.loras or {}, opened.source.path)
    values = lora_parameters(adapted).values()
    lossless = all((v.astype(mx.bfloat16) == v).all().item() for v in values)
    save_adapter(directory, adapted, mx.bfloat16 if lossless else None)
    check_tokenizer(directory, _embedding_rows(model))
    load_adapter(model, directory)


def _embedding_rows(model: nn.Module) -> int:
    kinds = nn.Embedding | nn.QuantizedEmbedding
    # a family that learns positions has an embedding of them too, and fewer
    return max(m.weight.shape[0] for _, m in model.named_modules() if isinstance(m, kinds))


def lazily(directory: Path, adapter: Path | None = None) -> Callable[[], nn.Module]:
    """Opens a converted directory, with an adapter on top, as often as it is asked."""

    def open_model() -> nn.Module:
        model = open_source(locate(str(directory)), None, directory).backbone()
        return load_adapter(model, adapter) if adapter else model

    return open_model


def finish(
    opened: OpenedSource,
    directory: Path,
    out: Path,
    form: str,
    cost: QuantizationCost,
    usage: str,
    agreement: Agreement,
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
    row = Converted(out, form, count, bits, size, cost, agreement)
    table = [
        ("parameters", f"{count:,}"),
        ("bits per weight", f"{bits:.2f}"),
        ("size", f"{size / 1e6:,.2f} MB"),
        *([("the source in PyTorch", agreement.describe())] if agreement.compared else []),
        ("what it cost", cost.describe()),
    ]
    write_manifest(directory)  # before the card, which people edit
    use = usage.format(command(out.name))
    write_text(directory / "README.md", model_card(opened, out.name, table, use))
    return row
