"""Tensors as trainers and transformers 5 store them, in the names and layouts that mlx-lm's loaders
know."""

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


def known_names(tensors: Tensors, model_type: str) -> Tensors:
    """The tensors of a model of a family; arrays that change are lazy."""
    arrays, files = {}, {}
    for stored, array in tensors.arrays.items():
        name = _renamed(stored, RENAMED[""] | RENAMED.get(model_type, {}))
        parts = experts_of_gpt_oss(name, array) if model_type == "gpt_oss" else ((name, array),)
        for part, value in parts:
            arrays[part], files[part] = value, tensors.files[stored]
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
