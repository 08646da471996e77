"""A source, opened: its configuration, and its model as often as it is wanted, read lazily."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_grpo.convert.adapters import LoRA, fuse, read_mlx_adapter, read_peft
from mlx_grpo.convert.gguf import read_gguf, write_tokenizer
from mlx_grpo.convert.source import Source, licence, locate
from mlx_grpo.convert.tensors import (
    TensorFile,
    Tensors,
    check_values,
    read_tensors,
    split_head,
    tensor_files,
)
from mlx_grpo.convert.tokenizer import copy_tokenizer
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import Parameters
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.directory import check_layers, rope_fields
from mlx_grpo.models.reward_model import REWARD_HEAD

SILU_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Their activation is fixed in mlx-lm, whatever the configuration says."""


@dataclass(frozen=True)
class OpenedSource:
    """What a source holds. Arrays are lazy; `tensors()` reads the files' headers anew each time, so
    that nothing stays in memory longer than somebody uses it."""

    source: Source
    config: dict[str, Any]
    """Of the model, or of an adapter's base, as mlx-lm reads it."""
    tensors: Callable[[], Tensors]
    head: Parameters
    """Reward head, fp32: `weight` [1, hidden], optional `bias` [1]; empty for a language model."""
    loras: dict[str, LoRA] | None
    """The adapter's layers; None where the source is no adapter."""
    base: Source
    """Where the model itself comes from; the source, if it is no adapter."""
    write_tokenizer: Callable[[Path], None]
    licence: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized already."""
        return "quantization" in self.config

    def backbone(self) -> nn.Module:
        """The model without the adapter, and, for a reward model, without a language model head."""
        tensors, config = self.tensors(), self.config
        if self.head:
            arrays = {n: v for n, v in tensors.arrays.items() if not n.startswith("lm_head.")}
            tensors = Tensors(arrays, tensors.files)
        return build_model(config, tensors, self.base.path)

    def model(self) -> nn.Module:
        """The model, its adapter fused into it."""
        model = self.backbone()
        if self.loras:
            fuse(model, self.loras, self.source.path)
        return model


def open_source(source: Source, base: str | None, scratch: Path) -> OpenedSource:
    """Open a source and check all that its files' headers tell.

    Args:
        base: the model an adapter belongs to, a path or Hub id; None for what the adapter says.
        scratch: a directory that outlives the result.

    Raises:
        InputError: a file is missing or damaged, or the architecture is not supported.
    """
    if source.kind in ("peft", "mlx-lora"):
        opened = _open_adapter(source, base, scratch)
    else:
        opened = _open_gguf(source) if source.kind == "gguf" else _open_model(source, scratch)
    _check_architecture(opened)
    return opened


def _open_model(source: Source, scratch: Path) -> OpenedSource:
    config, place = dict(source.config), source.path / "config.json"
    _check_fields(place, config)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and "quantization" not in config:
        raise InputError(
            f"{place}: quantized with {method}, which is not converted; give the model in 16 bits"
        )
    files = tensor_files(source.path, "model", scratch)
    found = read_tensors(files)
    rest, head = split_head(found.arrays)
    head = _checked_head(source, head, found.files)
    if not head and str((config.get("architectures") or [""])[0]).endswith(
        "ForSequenceClassification"
    ):
        raise InputError(
            f"{files[0].source}: tensor 'score.weight' is missing; this has no reward head"
        )
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in rest)

    def tensors() -> Tensors:
        again = read_tensors(files)
        return Tensors(split_head(again.arrays)[0], again.files)

    return OpenedSource(
        source=source,
        config=_with_head(config | rope_fields(config), head),
        tensors=tensors,
        head=head,
        loras=None,
        base=source,
        write_tokenizer=partial(copy_tokenizer, source.path),
        licence=licence(source.path),
    )


def _check_fields(place: Path, config: dict[str, Any]) -> None:
    """Raise InputError where a field that is read before the model is built has a wrong type."""
    kinds = {
        "architectures": (list, "list"),
        "quantization": (dict, "table"),
        "quantization_config": (dict, "table"),
        "rope_parameters": (dict, "table"),
    }
    for name, (kind, word) in kinds.items():
        if not isinstance(config.get(name), kind | None):
            raise InputError(f"{place}: field '{name}' must be a {word}, not {config[name]!r}")
    family, activation = config.get("model_type"), config.get("hidden_act") or "silu"
    if family in SILU_FAMILIES and activation not in ("silu", "swish"):
        raise InputError(
            f"{place}: hidden_act {activation!r} is not what mlx-lm computes for {family}: SiLU"
        )
    quantization = config.get("quantization")
    for name in ("bits", "group_size"):
        if quantization is not None and not isinstance(quantization.get(name), int):
            raise InputError(f"{place}: field 'quantization.{name}' must be a whole number")


def _open_gguf(source: Source) -> OpenedSource:
    config, _, metadata = read_gguf(source.path)

    def tensors() -> Tensors:
        arrays = read_gguf(source.path)[1]
        return Tensors(arrays, dict.fromkeys(arrays, source.path))

    return OpenedSource(
        source=source,
        config=config,
        tensors=tensors,
        head={},
        loras=None,
        base=source,
        write_tokenizer=lambda directory: write_tokenizer(metadata, directory, source.path),
        licence=metadata.get("general.license"),
    )


def _open_adapter(source: Source, base: str | None, scratch: Path) -> OpenedSource:
    name = base or source.base
    if not name:
        raise InputError(
            f"{source.path}: this adapter does not say which model it belongs to; give --sft-base "
            "or --rm-base"
        )
    try:
        opened = open_source(locate(name), None, scratch)
    except InputError as e:
        raise InputError(
            f"{source.path}: the base of this adapter cannot be used ({e}); name it with "
            "--sft-base or --rm-base"
        ) from e
    if opened.loras is not None:
        raise InputError(
            f"{source.path}: its base {opened.source.path} is an adapter too; merge that one first"
        )
    read = read_peft if source.kind == "peft" else read_mlx_adapter
    adapter = read(source.path, source.config, scratch)
    own = (source.path / "tokenizer.json").is_file()
    head = _checked_head(source, adapter.head, {})
    if opened.head and not head:
        raise InputError(
            f"{source.path}: its base {opened.source.path} is a reward model; give the language "
            "model it was made of"
        )
    return replace(
        opened,
        source=source,
        config=_with_head(opened.config, head),
        head=head,
        loras=adapter.loras,
        write_tokenizer=(lambda d: copy_tokenizer(source.path, d))
        if own
        else opened.write_tokenizer,
    )


def _with_head(config: dict[str, Any], head: Parameters) -> dict[str, Any]:
    """A reward model's language model head is not kept; for tied embeddings mlx-lm builds none."""
    return {**config, "tie_word_embeddings": True} if head else config


def _checked_head(source: Source, head: Parameters, files: dict[str, Path]) -> Parameters:
    """The reward head in fp32, from the source's tensors or a file of its own."""
    if not head and (source.path / REWARD_HEAD).is_file():
        stored = read_tensors([TensorFile(source.path / REWARD_HEAD, source.path / REWARD_HEAD)])
        own = {n: v for n, v in stored.arrays.items() if n in ("weight", "bias")}
        head, files = split_head(stored.arrays)[1] or own, stored.files
    for leaf, value in head.items():
        ends = (leaf, f"score.{leaf}", f"reward_head.{leaf}")
        found = ((n, f) for n, f in files.items() if n in ends)
        name, file = next(found, (f"score.{leaf}", source.path))
        check_values(name, value, file)
        if leaf == "weight" and (value.ndim != 2 or value.shape[0] != 1):
            raise InputError(
                f"{file}: tensor '{name}' has shape {list(value.shape)}; the head of a reward "
                "model has one label: [1, hidden_size]"
            )
        if leaf == "bias" and value.shape != (1,):
            raise InputError(f"{file}: tensor '{name}' has shape {list(value.shape)}, not [1]")
    if head and "weight" not in head:
        raise InputError(f"{source.path / REWARD_HEAD}: tensor 'weight' is missing")
    return {leaf: value.astype(mx.float32) for leaf, value in head.items()}


def build_model(config: dict[str, Any], tensors: Tensors, place: Path) -> nn.Module:
    """An mlx-lm model that holds the given arrays, lazily; each parameter must be there, and fit.

    Raises:
        InputError: an unknown architecture, a tensor that is missing, mis-shaped or unknown.
    """
    check_layers(place / "config.json" if place.is_dir() else place, config)
    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        arrays = dict(tensors.arrays)
        if hasattr(model, "sanitize"):
            arrays = model.sanitize(arrays)
        if quantization := config.get("quantization"):
            _make_quantized(model, quantization, arrays)
    except Exception as e:  # the model code of mlx-lm asserts and raises what it likes
        about = place / "config.json" if place.is_dir() else place
        raise InputError(f"{about}: no model can be built of this: {one_line(e)}") from e
    expected = dict(tree_flatten(model.parameters()))
    for name in sorted(expected.keys() | arrays.keys()):
        file = tensors.files.get(name, place)
        if name not in arrays:
            raise InputError(f"{file}: tensor '{name}' is missing")
        if name not in expected:
            raise InputError(f"{file}: tensor '{name}' has no place in this architecture")
        if arrays[name].shape != expected[name].shape:
            raise InputError(
                f"{file}: tensor '{name}' has shape {list(arrays[name].shape)}, config.json wants "
                f"{list(expected[name].shape)}"
            )
    model.load_weights(list(arrays.items()))
    model.eval()
    return model


def _make_quantized(model: nn.Module, quantization: dict[str, Any], arrays: Parameters) -> None:
    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        packed = hasattr(module, "to_quantized") and f"{path}.scales" in arrays
        return quantization.get(path, packed) if packed else False

    nn.quantize(
        model,
        quantization["group_size"],
        quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=how,
    )


def _check_architecture(opened: OpenedSource) -> None:
    """Raise InputError unless the model can be taken apart, and the head fits it."""
    place = opened.source.path
    model = opened.backbone()
    try:
        decoder = Decoder(model)
    except Exception as e:  # as above
        raise InputError(f"{place}: this architecture cannot be trained here: {one_line(e)}") from e
    if opened.head and opened.head["weight"].shape[1] != decoder.hidden_size:
        raise InputError(
            f"{place}: the reward head, tensor 'score.weight', has width "
            f"{opened.head['weight'].shape[1]}, the model's hidden size is {decoder.hidden_size}"
        )
