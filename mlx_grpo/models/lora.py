"""LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer of the blocks, in mlx-lm's format.

y = W x + scale * B^T A^T x with A [in, rank] and B [rank, out]; B starts at zero, so the adapted
model starts as the backbone itself. `scale` is absolute: what other libraries write as alpha /
rank.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.files.manifest import verify_manifest
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import share


class AddmmLoRALinear(LoRALinear):
    """mlx-lm's layer with fewer passes over its output: in W x + scale * (x A) B the last product,
    its scale and the sum are one `addmm`."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        a, b = (p.astype(x.dtype) for p in (self.lora_a, self.lora_b))
        return mx.addmm(y, x @ a, b, alpha=self.scale)


def add_lora(
    model: nn.Module,
    rank: int,
    scale: float,
    seed: int,
    blocks: int = 0,
    targets: Sequence[str] = (),
) -> nn.Module:
    """A tree that shares the arrays of `model` and has fresh fp32 LoRA layers; the draw depends on
    seed and layer name.

    Args:
        blocks: how many of the last blocks get a LoRA; 0 means all.
        targets: which linear layers, see `targeted`; empty means all.

    Raises:
        InputError: a target that the model does not have.
    """
    count = blocks or len(model.layers)
    adapted = with_lora_modules(
        model, count, {"rank": rank, "scale": scale, "dropout": 0.0}, targets
    )
    fresh: Parameters = {}
    for name, module in lora_modules(adapted):
        inputs, r = module.lora_a.shape
        bound = 1 / math.sqrt(inputs)
        fresh[f"{name}.lora_a"] = mx.random.uniform(
            -bound, bound, (inputs, r), key=key(seed, "lora", name)
        )
        fresh[f"{name}.lora_b"] = mx.zeros((r, module.lora_b.shape[1]))
    set_parameters(adapted, fresh)
    return adapted


def with_lora_modules(
    model: nn.Module, blocks: int, parameters: dict[str, Any], targets: Sequence[str] = ()
) -> nn.Module:
    """A tree that shares the arrays of `model` and has LoRA layers, their values still to be set.

    Args:
        blocks: how many of the last blocks, at least 1.
        parameters: mlx-lm's `lora_parameters`; without `keys` every linear layer, or those of
            `targets`.
    """
    adapted = share(model)
    adapted.freeze()
    keys = parameters.get("keys") or sorted(
        {
            name
            for layer in adapted.layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | nn.QuantizedLinear)
        }
    )
    keys = targeted(keys, targets)
    linear_to_lora_layers(adapted, blocks, {**parameters, "keys": keys})
    for _, module in lora_modules(adapted):
        module.__class__ = AddmmLoRALinear
    return adapted


def targeted(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Those of a block's linear layers that a target names, whole (`self_attn.q_proj`) or by its
    last parts (`q_proj`), as PEFT's `target_modules` do; all of them if there are no targets.

    Raises:
        InputError: a target that names none.
    """
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise InputError(f"--lora-target-modules: no layer '{target}'; this model has {known}")
    return [n for n in names if not targets or any(f".{n}".endswith(f".{t}") for t in targets)]


def lora_modules(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """Name and module of every LoRA layer, sorted by name."""
    return sorted((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))


def lora_parameters(model: nn.Module) -> Parameters:
    """The adapter's arrays by full name, sorted."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


def set_parameters(model: nn.Module, parameters: Parameters) -> None:
    """Put the given arrays in place by full name."""
    model.update(tree_unflatten(list(parameters.items())))


def scale_adapter(model: nn.Module, factor: float) -> None:
    """Scale what the adapter adds to the backbone, in place."""
    scaled = {n: factor * v for n, v in lora_parameters(model).items() if n.endswith(".lora_b")}
    mx.eval(scaled)
    set_parameters(model, scaled)


def save_adapter(directory: Path, model: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` as `mlx_lm.generate --adapter-path`
    reads them.

    Each file is written beside its place and then moved there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    modules = lora_modules(model)
    rank = modules[0][1].lora_a.shape[1]
    save_arrays(
        directory / "adapters.safetensors",
        {n: v.astype(dtype) if dtype else v for n, v in lora_parameters(model).items()},
    )
    places = [name.split(".layers.", 1)[1].split(".", 1) for name, _ in modules]
    write_json(
        directory / "adapter_config.json",
        {
            "fine_tune_type": "lora",
            # mlx-lm adapts the last ones, so from the first that has a LoRA to the end
            "num_layers": len(model.layers) - min(int(block) for block, _ in places),
            "lora_parameters": {
                "rank": rank,
                "scale": modules[0][1].scale,
                "dropout": 0.0,
                "keys": sorted({key for _, key in places}),
            },
        },
    )


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
    for name in sorted(expected.keys() | arrays.keys()):
        if name not in arrays:
            raise InputError(f"{file}: tensor '{name}' is missing")
        if name not in expected or arrays[name].shape != expected[name].shape:
            raise InputError(f"{file}: tensor '{name}' does not fit this model")
        if not mx.isfinite(arrays[name]).all().item():
            raise InputError(f"{file}: tensor '{name}' holds values that are not finite")
    set_parameters(adapted, arrays)
    return adapted
