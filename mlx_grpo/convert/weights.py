"""Build an mlx-lm model from a source, quantize it, write a directory that `mlx_lm.load` reads."""

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

from mlx_grpo.convert.gguf import read_gguf, write_tokenizer
from mlx_grpo.convert.source import Source
from mlx_grpo.errors import InputError
from mlx_grpo.models.backbone import rope_fields, safetensors_header, weight_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


@dataclass(frozen=True)
class Quantization:
    """Bits and group size of the target."""

    bits: int = 4
    group_size: int = 64


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer_config.json").is_file():
        raise InputError(f"{source}: tokenizer_config.json is missing")


def load_source(source: Source) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its configuration as the source stores it, lazily.

    Raises:
        InputError: unreadable, or an architecture mlx-lm does not know.
    """
    try:
        if source.kind == "gguf":
            config, weights, _ = read_gguf(source.path)
            return model_from(config, weights), config
        if not list(source.path.glob("model*.safetensors")):
            raise InputError(
                f"{source.path}: no model*.safetensors; save the model with safe_serialization=True"
            )
        for file in weight_files(source.path):
            safetensors_header(file)  # names a file that is cut short
        rope = rope_fields(source.config)
        model, config = load_model(source.path, lazy=True, model_config=rope)
        return model, config
    except InputError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, FileNotFoundError) as e:
        raise InputError(f"{source.path}: {' '.join(str(e).split())[:240]}") from e


def model_from(config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    """An mlx-lm model with the given weights; every backbone tensor must be there."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = model.sanitize(dict(weights)) if hasattr(model, "sanitize") else weights
    if quantization := config.get("quantization"):

        def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return quantization.get(
                path, hasattr(module, "to_quantized") and f"{path}.scales" in weights
            )

        nn.quantize(
            model, quantization["group_size"], quantization["bits"], class_predicate=predicate
        )
    expected = {name for name, _ in tree_flatten(model.parameters())}
    if missing := sorted(expected - weights.keys() - {"lm_head.weight"}):
        raise ValueError(f"tensor '{missing[0]}' is missing")
    model.load_weights(list(weights.items()), strict=False)
    return model


def quantize(model: nn.Module, config: dict[str, Any], target: Quantization) -> dict[str, Any]:
    """Quantize in place unless the model is quantized already; return the new configuration."""
    if "quantization" in config or target.bits == 16:
        return config
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # mlx-lm reports bits per weight on stdout; our table says it
        _, quantized = quantize_model(model, config, target.group_size, target.bits)
    return quantized


def write_model(directory: Path, source: Source, model: nn.Module, config: dict[str, Any]) -> None:
    """Weights, configuration and tokenizer."""
    save_model(directory, model)
    save_config(dict(config), directory / "config.json")
    if source.kind == "gguf":
        _, _, metadata = read_gguf(source.path)
        write_tokenizer(metadata, directory, source.path)
    else:
        copy_tokenizer(source.path, directory)


def check_finite(model: nn.Module, source: Source) -> None:
    """Raise InputError naming the first tensor with a value that is not finite."""
    for name, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            raise InputError(f"{source.path}: tensor '{name}' holds values that are not finite")


def bits_per_weight(directory: Path, parameters: int) -> float:
    """Stored bits per parameter."""
    return 8 * sum(f.stat().st_size for f in directory.glob("model*.safetensors")) / parameters
