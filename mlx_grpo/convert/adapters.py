"""LoRA adapters of PEFT and mlx-lm: read into one form, fused, or written as mlx-lm writes them.

PEFT holds A as [rank, in] and B as [out, rank] and scales by alpha / rank (alpha / sqrt(rank) with
rsLoRA); mlx-lm holds a = A^T, b = B^T and an absolute scale.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_grpo.backend.precision import can_expand, dense_twin, dense_weight, float_dtype
from mlx_grpo.convert.heads import split_head
from mlx_grpo.convert.tensors import check_values, read_tensors, tensor_files
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.lora import lora_modules, set_parameters, with_lora_modules
from mlx_grpo.models.lora_targets import EXPERTS, LINEAR

PEFT_PREFIX = "base_model.model."
CHANGES_THE_BASE = {"pissa", "olora", "corda", "loftq", "lora"}
"""Initialisations of PEFT that take the first update out of the weights; `lora` is `lora_ga`."""
SEES = ("vision", "visual", "multi_modal_projector", "audio")
"""In the names of layers that mlx-lm's text model does not have."""
MERGE = "merge it with peft's merge_and_unload() and convert the result"


@dataclass(frozen=True)
class LoRA:
    """The update of one linear layer: W + scale * (a b)^T; a [in, rank], b [rank, out]; or of
    experts: W + scale * b a; a [experts, rank, in], b [experts, out, rank]."""

    a: mx.array
    b: mx.array
    scale: float

    @property
    def experts(self) -> bool:
        """Whether it is of experts."""
        return self.a.ndim == 3

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it belongs to, [out, in] or [experts, out, in]."""
        if self.experts:
            return (*self.b.shape[:2], self.a.shape[2])
        return (self.b.shape[1], self.a.shape[0])

    def update(self) -> mx.array:
        """What is added to the weight."""
        return self.scale * (self.b @ self.a if self.experts else (self.a @ self.b).T)


@dataclass(frozen=True)
class Adapter:
    """An adapter as found: layers by module name, tensors of a reward head by their names."""

    loras: dict[str, LoRA]
    head: dict[str, mx.array]


def read_peft(directory: Path, config: dict[str, Any], scratch: Path) -> Adapter:
    """A PEFT adapter (`adapter_config.json`, `adapter_model.*`) for linear layers.

    Raises:
        InputError: another method than LoRA, a variant that is not a plain sum, unfit tensors.
    """
    place = directory / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise InputError(f"{place}: peft_type {config.get('peft_type')!r} is not LORA; {MERGE}")
    for field, plain in (("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False)):
        if (config.get(field) or plain) != plain:
            raise InputError(f"{place}: {field} {config[field]!r} is not converted; {MERGE}")
    _check_plain(config, place)
    files = tensor_files(directory, "adapter_model", scratch)
    tensors, file = read_tensors(files), files[0].source
    named = {
        _peft_name(name): (value, tensors.files[name]) for name, value in tensors.arrays.items()
    }
    found, head, _ = split_head({name: value for name, (value, _) in named.items()})
    _check({**found, **head}, {name: file for name, (_, file) in named.items()}, directory)
    loras = {}
    for module, (a, b) in _pairs(found, ".lora_A.weight", ".lora_B.weight", file).items():
        loras[module] = LoRA(a.T, b.T, _peft_scale(config, module, a.shape[0], place))
    return Adapter(loras, head)


def _check_plain(config: dict[str, Any], place: Path) -> None:
    """Raise InputError where the base was changed too, or not every token gets the update."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.split("_")[0].lower() in CHANGES_THE_BASE:
        raise InputError(f"{place}: init_lora_weights {start!r} changed the base too; {MERGE}")
    for field in ("alora_invocation_tokens", "layer_replication"):
        if config.get(field):
            raise InputError(f"{place}: {field} is not converted; {MERGE}")


def _peft_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(".modules_to_save", "").replace(".default", "")


def _peft_scale(config: dict[str, Any], module: str, rank: int, place: Path) -> float:
    try:
        alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except (KeyError, TypeError, re.error):
        raise InputError(f"{place}: field 'lora_alpha' is missing or not a number") from None


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of a module's name."""
    matches = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matches, default)


def read_mlx_adapter(directory: Path, config: dict[str, Any], scratch: Path) -> Adapter:
    """An adapter of `mlx_lm.lora` (`adapter_config.json`, `adapters.safetensors`).

    Raises:
        InputError: DoRA or full fine-tuning, or tensors that are not pairs of LoRA matrices.
    """
    place = directory / "adapter_config.json"
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise InputError(
            f"{place}: fine_tune_type {kind!r} is not converted; fuse it with mlx_lm.fuse and "
            "convert the result"
        )
    scale = (config.get("lora_parameters") or {}).get("scale")
    if not isinstance(scale, int | float):
        raise InputError(f"{place}: field 'lora_parameters.scale' is missing or not a number")
    files = tensor_files(directory, "adapters", scratch)
    tensors, file = read_tensors(files), files[0].source
    found, head, _ = split_head(tensors.arrays)
    _check({**found, **head}, tensors.files, directory)
    pairs = _pairs(found, ".lora_a", ".lora_b", file, experts=True)
    return Adapter({module: LoRA(a, b, float(scale)) for module, (a, b) in pairs.items()}, head)


def _check(arrays: dict[str, mx.array], files: dict[str, Path], directory: Path) -> None:
    for name, value in arrays.items():
        check_values(name, value, files.get(name, directory))


def _pairs(
    arrays: dict[str, mx.array], first: str, second: str, file: Path, experts: bool = False
) -> dict[str, tuple[mx.array, mx.array]]:
    """Module name to its two matrices; every tensor must be one of a pair.

    Args:
        experts: whether some may be those of experts, with three axes.
    """
    for name in arrays:
        twin = {first: second, second: first}
        end = next((e for e in twin if name.endswith(e)), None)
        if end is None or arrays[name].ndim not in ((2, 3) if experts else (2,)):
            raise InputError(f"{file}: tensor '{name}' is not a LoRA matrix; {MERGE}")
        other = name.removesuffix(end) + twin[end]
        if other not in arrays:
            raise InputError(f"{file}: tensor '{other}' is missing")
        if arrays[other].ndim != arrays[name].ndim:
            raise InputError(f"{file}: tensor '{other}' does not fit '{name}'")
    modules = [name.removesuffix(first) for name in arrays if name.endswith(first)]
    return {
        m: (arrays[m + first].astype(mx.float32), arrays[m + second].astype(mx.float32))
        for m in modules
    }


def in_model(loras: dict[str, LoRA], model: nn.Module) -> dict[str, LoRA]:
    """The layers of an adapter under the names that mlx-lm's model has for them.

    A multimodal model of transformers calls its text layers differently; what an adapter adds to
    the layers that see pictures changes nothing of a text.
    """
    names = [name for name, _ in model.named_modules()]
    placed = {}
    for name, lora in loras.items():
        if name not in names and any(part in name for part in SEES):
            continue
        block = re.search(r"layers\.\d+\..+", name)
        same = [n for n in names if block and n.endswith(f".{block[0]}")]
        placed[same[0] if name not in names and len(same) == 1 else name] = lora
    return placed


def fuse(model: nn.Module, loras: Mapping[str, LoRA], directory: Path, exact: bool = False) -> None:
    """Put W + scale * (a b)^T in the place of W, lazily, in fp32 with one rounding at the end.

    A quantized layer is quantized again as it was.

    Args:
        exact: leave the sum in fp32.
    """
    modules = dict(model.named_modules())
    replaced = []
    for name, lora in loras.items():
        module = _linear(modules, name, lora, directory)
        dense = dense_weight(module) + lora.update()
        linear = dense_twin(module)
        packed = "scales" in module
        dtype = float_dtype(module) if packed else module.weight.dtype
        linear.weight = dense if exact else dense.astype(dtype)
        if "bias" in module:
            linear.bias = module.bias
        if packed and not exact:
            linear = linear.to_quantized(module.group_size, module.bits, module.mode)
        replaced.append((name, linear))
    model.update_modules(tree_unflatten(replaced))


def _linear(modules: dict[str, nn.Module], name: str, lora: LoRA, directory: Path) -> nn.Module:
    module = modules.get(name)
    if not isinstance(module, (*LINEAR, *EXPERTS)):
        raise InputError(f"{directory}: the base model has no linear layer '{name}'")
    if "scales" in module and not can_expand(module):
        raise InputError(f"{directory}: '{name}' is packed in a form that no LoRA is added to")
    *rows, columns = module.weight.shape
    if "scales" in module:
        columns = columns * 32 // module.bits
    if lora.shape != (*rows, columns) or lora.rank != lora.b.shape[-1 if lora.experts else 0]:
        raise InputError(
            f"{directory}: LoRA of '{name}' has shapes {list(lora.a.shape)} and "
            f"{list(lora.b.shape)}, the base's layer is {[*rows, columns]}"
        )
    return module


def attach(model: nn.Module, loras: Mapping[str, LoRA], directory: Path) -> nn.Module:
    """A tree that shares the arrays of `model` and carries the adapter in mlx-lm's form.

    mlx-lm gives the same layers of the last N blocks one rank and one scale; what an adapter does
    not have is filled with zeros, which changes nothing. An empty adapter becomes one layer of
    zeros.
    """
    modules, blocks = dict(model.named_modules()), len(model.layers)
    for name, lora in loras.items():
        _linear(modules, name, lora, directory)
    places = {name: re.fullmatch(r".*layers\.(\d+)\.(.+)", name) for name in loras}
    if outside := [name for name, place in places.items() if place is None]:
        raise InputError(
            f"{directory}: LoRA of '{outside[0]}' is outside the blocks; use --rm-as full"
        )
    found = [(int(p[1]), p[2]) for p in places.values() if p]
    scales = {lora.scale for lora in loras.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max((lora.rank for lora in loras.values()), default=1)
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": 0.0}
    for name, experts in (("linear_rank", False), ("expert_rank", True)):
        own = [lora.rank for lora in loras.values() if lora.experts == experts]
        parameters[name] = max(own, default=rank)
    if found:
        parameters["keys"] = sorted({key for _, key in found})
    last = blocks - min((block for block, _ in found), default=blocks - 1)
    adapted = with_lora_modules(model, last, parameters)
    values: dict[str, mx.array] = {}
    for name, module in lora_modules(adapted):
        a, b = mx.zeros(module.lora_a.shape), mx.zeros(module.lora_b.shape)
        if name in loras:
            lora = loras[name]
            b_of_rank = (..., slice(lora.rank)) if lora.experts else slice(lora.rank)
            a[:, : lora.rank], b[b_of_rank] = lora.a, lora.b * (lora.scale / scale)
        values |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    set_parameters(adapted, values)
    return adapted
