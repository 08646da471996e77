"""Parameters in their final form, streamed: one module is read, checked, quantized and let go
before the next is read, and each file is written as soon as it is full.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_grpo.backend.own_dtypes import may_cast
from mlx_grpo.convert.reader import OpenedSource
from mlx_grpo.convert.tensors import check_values
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import write_json
from mlx_grpo.files.safetensors import save_arrays
from mlx_grpo.models.directory import weight_files

GROUP_SIZES = (32, 64, 128)
"""That MLX's affine quantization knows."""
SHARD_BYTES = 1 << 30
"""Of a file of weights: no more than this waits in memory to be written."""


@dataclass(frozen=True)
class Quantization:
    """Bits and group size of the target; 16 bits leave the weights unquantized."""

    bits: int = 4
    group_size: int = 64


def quantized_config(
    opened: OpenedSource, model: nn.Module, target: Quantization
) -> dict[str, Any]:
    """config.json of the converted model. One that is quantized already stays as it is."""
    if opened.quantized:
        return opened.config
    config = {n: v for n, v in opened.config.items() if n != "torch_dtype"}
    halves = any(v.dtype == mx.float16 for v in opened.tensors().arrays.values())
    config["dtype"] = "float16" if halves else "bfloat16"
    if target.bits == 16:
        return config
    quantization: dict[str, Any] = {
        "group_size": target.group_size,
        "bits": target.bits,
        "mode": "affine",
    }
    predicate = getattr(model, "quant_predicate", None)
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        choice = how_quantized(predicate(path, module) if predicate else True, module, target)
        if choice is True and module.weight.shape[-1] % target.group_size:
            raise InputError(
                f"{opened.source.path}: layer '{path}' is {module.weight.shape[-1]} wide, which "
                f"--group-size {target.group_size} does not divide; choose a smaller one"
            )
        if choice is not True:  # a family may keep a layer finer, or whole
            quantization[path] = choice
    return {**config, "quantization": quantization, "quantization_config": quantization}


def how_quantized(
    wanted: bool | dict[str, Any], module: nn.Module, target: Quantization
) -> bool | dict[str, Any]:
    """How a layer is quantized: as the target says (True), in its own way, or not at all.

    A family's own way may leave out the bits or the group size, and its group may not divide this
    layer: then a smaller one does, or the layer stays whole, as where no group divides it.
    """
    width = module.weight.shape[-1]
    if not wanted or all(width % group for group in GROUP_SIZES):
        return False
    if wanted is True:
        return True
    own = {"group_size": target.group_size, "bits": target.bits, **wanted}
    group = max(g for g in GROUP_SIZES if width % g == 0)
    return {**own, "group_size": own["group_size"] if width % own["group_size"] == 0 else group}


def stream(
    model: nn.Module, config: dict[str, Any], opened: OpenedSource
) -> Iterator[tuple[str, mx.array]]:
    """(name, array) of each parameter as `config` wants it: linear layers and embeddings quantized,
    other floats in 16 bits but for those that the family keeps in fp32.

    Raises:
        InputError: a tensor holds values that no weight can have; file and tensor are named.
    """
    files = opened.tensors().files
    dtype = mx.float16 if config.get("dtype") == "float16" else mx.bfloat16
    modules, castable = dict(model.named_modules()), may_cast(model)
    leaves: dict[str, list[str]] = {}
    for name, _ in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, []).append(leaf)
    for path, names in leaves.items():
        module, prefix = modules.pop(path), f"{path}." if path else ""
        for leaf in names:
            value = module[leaf]
            if not opened.quantized and value.dtype in (mx.float32, mx.float64):
                value = value.astype(dtype if castable(prefix + leaf) else mx.float32)
            check_values(prefix + leaf, value, files.get(prefix + leaf, opened.base.path))
            module[leaf] = value
        # what a quantized source left whole stays whole; fused layers are packed again already
        as_it_is = opened.quantized
        packed = module if as_it_is else _quantized(path, module, config.get("quantization"))
        for leaf in names if packed is module else sorted(packed.parameters()):
            mx.eval(packed[leaf])
            yield prefix + leaf, packed[leaf]
        for leaf in names:  # the tree lets go of what it held
            module[leaf] = mx.array(0.0)


def _quantized(path: str, module: nn.Module, quantization: dict[str, Any] | None) -> nn.Module:
    if not quantization or not hasattr(module, "to_quantized"):
        return module
    choice = quantization.get(path, quantization)
    if choice is False or module.weight.shape[-1] % choice["group_size"]:
        return module  # the second only where another model's settings are tried on this one
    mode = choice.get("mode", "affine")
    named = {} if mode == "affine" else {"mode": mode}  # a layer of a family's own may not know it
    return module.to_quantized(choice["group_size"], choice["bits"], **named)


def write_weights(directory: Path, parameters: Iterable[tuple[str, mx.array]]) -> None:
    """Write `model.safetensors`, or several files with an index, as mlx-lm and transformers do."""
    shard: dict[str, mx.array] = {}
    written: list[list[str]] = []

    def flush() -> None:
        written.append(list(shard))
        save_arrays(directory / f"model-{len(written):05d}.safetensors", shard)
        shard.clear()
        mx.clear_cache()

    for name, value in parameters:
        if shard and sum(v.nbytes for v in shard.values()) + value.nbytes > SHARD_BYTES:
            flush()
        shard[name] = value
    flush()
    places: dict[str, str] = {}
    for i, names in enumerate(written, start=1):
        final = f"model-{i:05d}-of-{len(written):05d}" if len(written) > 1 else "model"
        (directory / f"model-{i:05d}.safetensors").rename(directory / f"{final}.safetensors")
        places |= dict.fromkeys(names, f"{final}.safetensors")
    if len(written) > 1:
        size = sum(f.stat().st_size for f in directory.glob("model-*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)


def first_difference(parameters: Iterable[tuple[str, mx.array]], directory: Path) -> str | None:
    """The first parameter that the model in `directory` does not hold bit for bit."""
    stored: dict[str, mx.array] = {}
    for file in weight_files(directory):
        stored |= mx.load(str(file))
    for name, value in parameters:
        other = stored.pop(name, None)
        same = other is not None and other.dtype == value.dtype and other.shape == value.shape
        if not same or not mx.array_equal(value, other).item():
            return name
    return None


def bits_per_weight(directory: Path, parameters: int) -> float:
    """Stored bits per parameter."""
    return 8 * sum(f.stat().st_size for f in directory.glob("model*.safetensors")) / parameters
