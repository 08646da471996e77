"""LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer of the blocks, in mlx-lm's format.

y = W x + scale * B^T A^T x with A [in, rank] and B [rank, out]; B starts at zero, so the adapted
model starts as the backbone itself. `scale` is absolute: what other libraries write as alpha /
rank.

Each expert of a mixture has a LoRA of its own, as mlx-lm writes it: A [experts, rank, in] and
B [experts, out, rank]. Its parameters grow with the number of experts, hence a rank of its own.
mlx-lm's files know one rank for all layers: a saved adapter is filled up with zeros to the larger
one, which adds nothing, and `expert_rank` beside `rank` says what is real.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_grpo.backend.kernels import aligned_rank, gathered_dtype
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.files.manifest import verify_manifest
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import share
from mlx_grpo.models.lora_targets import EXPERTS, lora_keys, targeted


class AddmmLoRALinear(LoRALinear):
    """mlx-lm's layer with fewer passes over its output: in W x + scale * (x A) B the last product,
    its scale and the sum are one `addmm`."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        a, b = (p.astype(x.dtype) for p in (self.lora_a, self.lora_b))
        return mx.addmm(y, x @ a, b, alpha=self.scale)


class GatherLoRA(LoRASwitchLinear):
    """mlx-lm's LoRA on experts, where the device can in the dtype of what it reads."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = x.astype(gathered_dtype(x.dtype))
        for factor in (aligned_rank(self.lora_a, 1), aligned_rank(self.lora_b, 2)):
            z = mx.gather_mm(
                z,
                factor.astype(z.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + (self.scale * z).astype(y.dtype)


OWN_RANKS = ("linear_rank", "expert_rank")
OWN_LAYERS = {LoRALinear: AddmmLoRALinear, LoRASwitchLinear: GatherLoRA}


def add_lora(
    model: nn.Module,
    rank: int,
    scale: float,
    seed: int,
    blocks: int = 0,
    expert_rank: int = 0,
    targets: Sequence[str] = (),
) -> nn.Module:
    """A tree that shares the arrays of `model` and has fresh fp32 LoRA layers; the draw depends on
    seed and layer name.

    Args:
        blocks: how many of the last blocks get a LoRA; 0 means all.
        expert_rank: of the LoRA on each expert of a mixture; 0 leaves experts without.
        targets: which layers, see `targeted`; empty means all.

    Raises:
        InputError: a target that the model does not have.
    """
    parameters = {"rank": rank, "expert_rank": expert_rank, "scale": scale, "dropout": 0.0}
    adapted = with_lora_modules(model, blocks or len(model.layers), parameters, targets)
    fresh: Parameters = {}
    for name, module in lora_modules(adapted):
        for leaf, value in tree_flatten(module.trainable_parameters()):
            kind, *part = leaf.split(".")  # some families have several in one layer
            bound = 1 / math.sqrt(value.shape[0 if value.ndim == 2 else -1])
            draw = key(seed, "lora", name, *part)
            fresh[f"{name}.{leaf}"] = (
                mx.random.uniform(-bound, bound, value.shape, key=draw)
                if kind == "lora_a"
                else mx.zeros(value.shape)
            )
    set_parameters(adapted, fresh)
    return adapted


def with_lora_modules(
    model: nn.Module, blocks: int, parameters: dict[str, Any], targets: Sequence[str] = ()
) -> nn.Module:
    """A tree that shares the arrays of `model` and has LoRA layers, their values still to be set.

    Args:
        blocks: how many of the last blocks, at least 1.
        parameters: mlx-lm's `lora_parameters`; without `keys` every linear layer or those of
            `targets`, and experts where `expert_rank` is not 0. It and `linear_rank` are those of
            `rank` where they are missing.
    """
    adapted = share(model)
    adapted.freeze()
    linear_rank, expert_rank = (parameters.get(n, parameters["rank"]) for n in OWN_RANKS)
    keys = parameters.get("keys") or targeted(lora_keys(adapted, expert_rank > 0), targets)
    modules = [m for block in adapted.layers for m in block.named_modules()]
    experts = {name for name, module in modules if isinstance(module, EXPERTS)}
    for rank, own in ((linear_rank, set(keys) - experts), (expert_rank, set(keys) & experts)):
        if own:
            linear_to_lora_layers(adapted, blocks, {**parameters, "rank": rank, "keys": own})
    for _, module in lora_modules(adapted):
        if type(module) in OWN_LAYERS:
            module.__class__ = OWN_LAYERS[type(module)]
    return adapted


def lora_modules(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """Name and module of every LoRA layer, sorted by name; a family may have a kind of its own."""
    return sorted((n, m) for n, m in model.named_modules() if "lora_a" in m)


def lora_parameters(model: nn.Module) -> Parameters:
    """The adapter's arrays by full name, sorted."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


def set_parameters(model: nn.Module, parameters: Parameters) -> None:
    """Put the given arrays in place by full name."""
    model.update(tree_unflatten(list(parameters.items())))


def scale_adapter(model: nn.Module, factor: float) -> None:
    """Scale what the adapter adds to the backbone, in place."""
    scaled = {n: factor * v for n, v in lora_parameters(model).items() if _leaf(n) == "lora_b"}
    mx.eval(scaled)
    set_parameters(model, scaled)


def save_adapter(directory: Path, model: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` as `mlx_lm.generate --adapter-path`
    reads them.

    Each file is written beside its place and then moved there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ranks = _ranks(model)
    save_arrays(
        directory / "adapters.safetensors",
        {n: v.astype(dtype) if dtype else v for n, v in saved_parameters(model).items()},
    )
    places = [
        (i, name)
        for i, block in enumerate(model.layers)
        for name, module in block.named_modules()
        if "lora_a" in module
    ]
    write_json(
        directory / "adapter_config.json",
        {
            "fine_tune_type": "lora",
            # mlx-lm adapts the last ones, so from the first that has a LoRA to the end
            "num_layers": len(model.layers) - min(i for i, _ in places),
            "lora_parameters": {
                "rank": max(ranks.values()),
                **(ranks if len(set(ranks.values())) > 1 else {}),
                "scale": lora_modules(model)[0][1].scale,
                "dropout": 0.0,
                "keys": sorted({name for _, name in places}),
            },
        },
    )


def saved_parameters(model: nn.Module) -> Parameters:
    """The adapter's arrays as `save_adapter` writes them, lazy: each of the largest rank."""
    rank = max(_ranks(model).values())
    return {n: _filled_up(v, rank, n) for n, v in lora_parameters(model).items()}


def _ranks(model: nn.Module) -> dict[str, int]:
    """Ranks of the linear layers and of the experts, of those that have a LoRA."""
    found = {}
    for name, value in lora_parameters(model).items():
        found[OWN_RANKS[value.ndim == 3]] = value.shape[_rank_axis(name, value)]
    return found


def _leaf(name: str) -> str:
    """`lora_a` or `lora_b`; some families number several of them in one layer."""
    return next(part for part in reversed(name.split(".")) if part.startswith("lora_"))


def _rank_axis(name: str, value: mx.array) -> int:
    if _leaf(name) == "lora_a":
        return 1
    return 0 if value.ndim == 2 else 2


def _filled_up(value: mx.array, rank: int, name: str) -> mx.array:
    """With zeros up to a rank."""
    axis = _rank_axis(name, value)
    widths = [(0, rank - n if i == axis else 0) for i, n in enumerate(value.shape)]
    return mx.pad(value, widths) if widths[axis][1] else value


def _without_filling(value: mx.array, rank: int, name: str) -> mx.array:
    """What `_filled_up` made of an array of this rank; anything else as it is."""
    axis, full = _rank_axis(name, value), value
    place = tuple(slice(rank if i == axis else None) for i in range(value.ndim))
    same = mx.array_equal(_filled_up(value[place], full.shape[axis], name), full)
    return value[place] if same.item() else value


def load_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """A tree that shares the arrays of `model` and carries the adapter in `directory`.

    Raises:
        InputError: a file is missing or damaged, a tensor is missing, unknown, mis-shaped or not
            finite.
    """
    verify_manifest(directory)
    config = read_json(directory / "adapter_config.json")
    parameters = config.get("lora_parameters") or {}
    for name, fields in (("num_layers", config), ("rank", parameters), ("scale", parameters)):
        place = f"{directory / 'adapter_config.json'}: field '{name}'"
        if not isinstance(fields, dict) or name not in fields:
            raise InputError(f"{place} is missing")
        kind = float if name == "scale" and isinstance(fields[name], float) else int
        if type(fields[name]) is not kind or not math.isfinite(fields[name]):
            raise InputError(f"{place} must be a number, not {str(fields[name])[:40]!r}")
    adapted = with_lora_modules(model, config["num_layers"], {"dropout": 0.0, **parameters})
    file = directory / "adapters.safetensors"
    arrays = {name: value.astype(mx.float32) for name, value in load_arrays(file).items()}
    expected = lora_parameters(adapted)
    for name in expected.keys() & arrays.keys() if "expert_rank" in parameters else ():
        rank = expected[name].shape[_rank_axis(name, expected[name])]
        if arrays[name].ndim == expected[name].ndim:
            arrays[name] = _without_filling(arrays[name], rank, name)
    for name in sorted(expected.keys() | arrays.keys()):
        if name not in arrays:
            raise InputError(f"{file}: tensor '{name}' is missing")
        if name not in expected or arrays[name].shape != expected[name].shape:
            raise InputError(f"{file}: tensor '{name}' does not fit this model")
        if not mx.isfinite(arrays[name]).all().item():
            raise InputError(f"{file}: tensor '{name}' holds values that are not finite")
    set_parameters(adapted, arrays)
    return adapted
