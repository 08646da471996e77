"""A source, opened: its configuration, and its model as often as it is wanted, read lazily."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_grpo.convert.adapters import LoRA, fuse, in_model, read_mlx_adapter, read_peft
from mlx_grpo.convert.build import build_model
from mlx_grpo.convert.families import plain_floats
from mlx_grpo.convert.gguf import read_gguf, write_tokenizer
from mlx_grpo.convert.heads import checked_head, prefixes_of, split_head, what_else
from mlx_grpo.convert.source import Source, licence, locate
from mlx_grpo.convert.stored_names import known_names
from mlx_grpo.convert.tensors import Tensors, read_tensors, tensor_files
from mlx_grpo.convert.tokenizer import copy_tokenizer
from mlx_grpo.convert.translate import translated
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import Parameters
from mlx_grpo.models.check import check_trainable
from mlx_grpo.models.reward_model import head_parts

OUTPUT = "lm_head.weight"
OUTPUTS = ("lm_head.", "language_model.lm_head.", "output.")
"""How the names of a language model's head begin; InternLM2's is `output`."""
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
    """Reward head, fp32, as `heads.in_one_form` gives it; empty for a language model."""
    loras: dict[str, LoRA] | None
    """The adapter's layers; None where the source is no adapter."""
    base: Source
    """Where the model itself comes from; the source, if it is no adapter."""
    write_tokenizer: Callable[[Path], None]
    licence: str | None = None
    own_tokenizer: bool = False
    """Whether an adapter brings its tokenizer."""

    @property
    def pools_at_padding(self) -> bool:
        """Whether the score is read at the last token that is not padding, as transformers does."""
        names = str((self.source.config.get("architectures") or [""])[0])
        other = names.endswith(("ForCausalLM", "RewardModel", "SequenceRegression"))
        return self.classifier or not other or names == "Qwen2ForRewardModel"

    @property
    def classifier(self) -> bool:
        """Whether a reward model is one of transformers' classifiers, or an adapter for one."""
        if self.source.kind == "peft":
            return self.source.config.get("task_type") == "SEQ_CLS"
        names = self.source.config.get("architectures") or [""]
        return str(names[0]).endswith("ForSequenceClassification")

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized already."""
        return "quantization" in self.config

    def backbone(self) -> nn.Module:
        """The model without the adapter, and, for a reward model, without a language model head."""
        tensors, config = self.tensors(), self.config
        if self.head:
            arrays = {n: v for n, v in tensors.arrays.items() if not n.startswith(OUTPUTS)}
            tensors = Tensors(arrays, tensors.files)
        return build_model(config, tensors, self.base.path)

    def model(self, exact: bool = False) -> nn.Module:
        """The model, its adapter fused into it; `exact` spares the sum its rounding to 16 bits."""
        model = self.backbone()
        if self.loras:
            fuse(model, self.loras, self.source.path, exact)
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
    config, place = plain_floats(source.config), source.path / "config.json"
    _check_fields(place, config)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and "quantization" not in config:
        raise InputError(
            f"{place}: quantized with {method}, which is not converted; give the model in 16 bits"
        )
    if what := what_else(config, ()):
        raise InputError(f"{place}: this is {what}")
    files, prefixes = tensor_files(source.path, "model", scratch), prefixes_of(config)
    family = str(config.get("model_type"))
    found = known_names(read_tensors(files), family)
    rest, stored, _ = split_head(found.arrays, prefixes)
    head = checked_head(source.path, config, stored, found.files, scratch)
    if not head and (what := what_else(config, found.arrays)):
        raise InputError(f"{files[0].source}: this is {what}")
    if not head and str((config.get("architectures") or [""])[0]).endswith(
        "ForSequenceClassification"
    ):
        raise InputError(
            f"{files[0].source}: tensor 'score.weight' is missing; this model has no reward head"
        )
    own_head = next((n for n in rest if n.endswith(OUTPUT)), None)
    config.setdefault("tie_word_embeddings", own_head is None)
    config = translated(config)
    if own_head and not head and _differs_from_embedding(own_head, rest):
        # transformers keeps a stored head whatever the configuration says
        config = _untied(config)

    def tensors() -> Tensors:
        again = known_names(read_tensors(files), family)
        return Tensors(split_head(again.arrays, prefixes)[0], again.files)

    return OpenedSource(
        source=source,
        config=_with_head(config, head),
        tensors=tensors,
        head=head,
        loras=None,
        base=source,
        write_tokenizer=partial(copy_tokenizer, source.path),
        licence=licence(source.path),
    )


def _differs_from_embedding(name: str, arrays: Parameters) -> bool:
    """Whether a stored language model head holds other values than the embedding."""
    table = next((v for n, v in arrays.items() if n.endswith("embed_tokens.weight")), None)
    head = arrays[name]
    if table is None or table.shape != head.shape:
        return True
    return not mx.array_equal(head, table).item()


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    inner = {"text_config": _untied(text)} if isinstance(text, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


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
    if source.kind == "peft" and _folds_multipliers(opened.config):
        raise InputError(
            f"{source.path}: mlx-lm folds the multipliers of falcon_h1 into the weights, which an "
            "adapter from PEFT does not go with; merge it with PEFT first and convert the result"
        )
    own = any((source.path / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))
    head = checked_head(source.path, source.config, adapter.head, {}, scratch)
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
        loras=in_model(adapter.loras, opened.backbone()),
        write_tokenizer=partial(copy_tokenizer, source.path, base=opened.base.path)
        if own
        else opened.write_tokenizer,
        own_tokenizer=own,
    )


def _folds_multipliers(config: dict[str, Any]) -> bool:
    """Whether mlx-lm's weights of a model are the source's times a constant."""
    factors = [np.ravel(v) for n, v in config.items() if n.endswith(("multiplier", "multipliers"))]
    return config.get("model_type") == "falcon_h1" and any((f != 1).any() for f in factors)


def _with_head(config: dict[str, Any], head: Parameters) -> dict[str, Any]:
    """A reward model's language model head is not kept; for tied embeddings mlx-lm builds none,
    whichever part of a multimodal configuration it reads."""
    if not head:
        return config
    text = config.get("text_config")
    nested = {"text_config": _with_head(text, head)} if isinstance(text, dict) else {}
    return {**config, **nested, "tie_word_embeddings": True}


def _check_architecture(opened: OpenedSource) -> None:
    """Raise InputError unless the model can be taken apart, and the head fits it."""
    place = opened.source.path
    model = opened.backbone()
    try:
        decoder = check_trainable(model)
    except Exception as e:  # as above
        raise InputError(f"{place}: this architecture cannot be trained here: {one_line(e)}") from e
    if opened.head:
        weight, _, first = head_parts(opened.head)
        width = (first.weight if first else weight).shape[-1]
        if width != decoder.hidden_size:
            raise InputError(
                f"{place}: the reward head, tensor 'score.weight', has width {width}, the model's "
                f"hidden size is {decoder.hidden_size}"
            )
