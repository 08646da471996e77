"""Tensors as trainers and transformers 5 store them, in the names and layouts that mlx-lm's loaders
know."""

import re
from collections import defaultdict
from collections.abc import Iterator

import mlx.core as mx

from mlx_grpo.convert.tensors import Tensors

RENAMED = {
    "": {"pretrained_model.": ""},  # the prefix of TRL's value-head models, of any family
    "gpt2": {"transformer.": ""},
    "olmo_hybrid": {
        ".attention_layer_norm.": ".input_layernorm.",
        ".feedforward_layer_norm.": ".post_attention_layernorm.",
    },
}
"""Parts of names, by family."""
STACKED = ("qwen3_5_moe", "qwen3_5_moe_text")
"""Families whose experts mlx-lm knows in one tensor alone; transformers 5 saves one for each."""
EXPERT = re.compile(r"(?P<mlp>.+\.mlp)\.experts\.(?P<number>\d+)\.(?P<rest>\w+_proj\.weight)")


def known_names(tensors: Tensors, model_type: str) -> Tensors:
    """The tensors of a model of a family; arrays that change are lazy."""
    arrays, files = {}, {}
    for stored, array in tensors.arrays.items():
        name = _renamed(stored, RENAMED[""] | RENAMED.get(model_type, {}))
        parts = experts_of_gpt_oss(name, array) if model_type == "gpt_oss" else ((name, array),)
        for part, value in parts:
            arrays[part], files[part] = value, tensors.files[stored]
    found = Tensors(arrays, files)
    return _stacked(found) if model_type in STACKED else found


def _stacked(tensors: Tensors) -> Tensors:
    """With the experts of each layer in one tensor. Where a number is missing or a shape differs,
    they stay as they were, and have no place in the model."""
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for name in tensors.arrays:
        if parts := EXPERT.fullmatch(name):
            whole = f"{parts['mlp']}.switch_mlp.{parts['rest']}"
            layers[whole][int(parts["number"])] = name
    arrays, files = dict(tensors.arrays), dict(tensors.files)
    for whole, names in layers.items():
        shapes = {tuple(arrays[name].shape) for name in names.values()}
        if sorted(names) == list(range(len(names))) and len(shapes) == 1:
            arrays[whole] = mx.stack([arrays.pop(names[i]) for i in range(len(names))])
            files[whole] = files[names[0]]
    return Tensors(arrays, files)


def _renamed(name: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        name = name.replace(old, new) if old.startswith(".") else name.removeprefix(old)
    return name


def experts_of_gpt_oss(name: str, array: mx.array) -> Iterator[tuple[str, mx.array]]:
    """Experts in 16 bits, [experts, in, out] with gate and up interleaved, of which mlx-lm knows
    the packed form alone."""
    stem, _, leaf = name.rpartition(".")
    projection, _, kind = leaf.partition("_proj")
    if not stem.endswith(".experts") or kind not in ("", "_bias"):
        yield name, array
        return
    end = "bias" if kind else "weight"
    turned = array if kind else array.swapaxes(-1, -2)
    if projection == "gate_up":
        yield f"{stem}.gate_proj.{end}", turned[:, ::2]
        yield f"{stem}.up_proj.{end}", turned[:, 1::2]
    else:
        yield f"{stem}.{leaf.removesuffix('_bias')}.{end}", turned
