"""Load a model directory once; hand out module trees that share its arrays."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_grpo.backend.precision import Precision, apply_precision, choose_precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import (
    OWN_TEMPLATE,
    check_template,
    read_chat_tokenizer,
    stop_at_end_of_turn,
)
from mlx_grpo.data.template import Template
from mlx_grpo.files.manifest import verify_manifest
from mlx_grpo.models.block_calls import States
from mlx_grpo.models.check import check_decoder
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.directory import (
    Stamps,
    load_lazily,
    load_unchanged,
    parameter_count,
    weight_stamps,
)

PROBE = "What is the capital of France? The capital of France is Paris, a city on the river Seine."


@dataclass(frozen=True)
class Backbone:
    """Frozen weights with their tokenizer; the model itself serves as the reference precision."""

    path: Path
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    precision: Precision
    stamps: Stamps = ()
    """Of the weight files, as they were read."""
    note: str | None = None
    """What its user should be told: a stop token that the configuration had forgotten."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return frozenset(self.tokenizer.eos_token_ids)

    def packed(self) -> nn.Module:
        """The model as it is stored, from its files; lazy.

        Raises:
            InputError: they are not what they were when this backbone was loaded.
        """
        return load_unchanged(self.path, self.stamps)


def load_backbone(
    path: Path, precision: Precision | None = None, template: Template = OWN_TEMPLATE
) -> Backbone:
    """Load an mlx-lm directory, frozen and in the form of the compute precision.

    Args:
        template: what is changed about the chat template.

    Raises:
        InputError: no such directory, damaged or unreadable weights, a tokenizer without a chat
            template, or a model that does not compute the same when it is taken apart.
    """
    verify_manifest(path)
    stamps = weight_stamps(path)
    # the configuration that comes back has the stop tokens of generation_config.json
    model, config = load_lazily(path)
    precision = precision or choose_precision(parameter_count(path))
    with ThreadPoolExecutor(1) as beside:  # Python's work beside that of MLX, which waits for files
        reading = beside.submit(read_chat_tokenizer, path, config.get("eos_token_id"), template)
        _in_form(model, precision)
        tokenizer = reading.result()
    check_template(Path(template.file or path), tokenizer)
    check_decoder(Decoder(model))
    try:
        note = stop_at_end_of_turn(tokenizer)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    named = f"{path}: {note}" if note else None
    return Backbone(path, model, tokenizer, config, precision, stamps, named)


def load_alone(path: Path, precision: Precision | None = None) -> nn.Module:
    """As `load_backbone`, without the tokenizer."""
    verify_manifest(path)
    model, _ = load_lazily(path)
    _in_form(model, precision or choose_precision(parameter_count(path)))
    check_decoder(Decoder(model))
    return model


def largest_state(backbone: Backbone) -> float:
    """Largest absolute value that a short text meets between two blocks, infinite where the dtype's
    range is left."""
    decoder = Decoder(backbone.model)
    tokens = mx.array([backbone.tokenizer.encode(PROBE)])
    e = decoder.embed(tokens[:, :1], tokens[:, 1:])
    most = 0.0
    states: States = (e.h_prompt, e.h_rows)
    for i in range(len(decoder.blocks)):
        states = decoder.run_block(e, i, *states)
        found = max(mx.abs(h).max().astype(mx.float32).item() for h in states)
        most = max(most, found if math.isfinite(found) else math.inf)
    return most


def _in_form(model: nn.Module, precision: Precision) -> None:
    apply_precision(model, precision)
    model.freeze()
    model.eval()


def share(model: nn.Module) -> nn.Module:
    """A second module tree that holds the same arrays: modules can be replaced in it, no weight is
    copied."""
    arrays = {id(value): value for _, value in tree_flatten(model.parameters())}
    return copy.deepcopy(model, arrays)
