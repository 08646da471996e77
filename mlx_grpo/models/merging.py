"""The LoRA inside the frozen weights while answers are sampled, where weights are dense.

y = W' x with W' = W + scale * (A B)^T takes one product where W x + scale * B^T A^T x takes three
and four passes more. There is no second copy: the arrays themselves change, for every role that
holds them, and are expanded anew from the packed weights afterwards, so that they come back bit for
bit. Nothing but a rollout may run in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_grpo.backend.precision import expand_into, in_parts
from mlx_grpo.models.backbone import Backbone, share
from mlx_grpo.models.lora import OWN_LAYERS, lora_modules


@contextmanager
def merged_for_rollout(backbone: Backbone, policy: nn.Module) -> Iterator[nn.Module]:
    """A policy on `backbone` in the form that samples fastest; for the time of a rollout only.

    Raises:
        InputError: the files of the backbone have changed; nothing else has then.
    """
    layers = lora_modules(policy)
    if not (backbone.precision.merge_lora and layers):
        yield policy
    elif not any(mx.any(layer.lora_b).item() for _, layer in layers):
        yield backbone.model  # a LoRA that has not been trained adds nothing
    else:
        with merged(policy, backbone.packed()) as model:
            yield model


@contextmanager
def merged(policy: nn.Module, packed: nn.Module) -> Iterator[nn.Module]:
    """The policy with its LoRA in its linear layers, in the arrays that other trees share; they are
    what they were afterwards, however it ends.

    Args:
        packed: the same model, quantized. A layer that is not has nothing it could be restored
            from, and keeps its LoRA beside it.
    """
    stored = dict(packed.named_modules())
    layers = [(n, m) for n, m in lora_modules(policy) if _can_merge(m, stored[n])]
    sources = [stored[name] for name, _ in layers]
    mx.eval([source.parameters() for source in sources])  # what can fail, before anything changes
    model = share(policy)
    model.update_modules(tree_unflatten([(name, layer.linear) for name, layer in layers]))
    try:
        for _, layer in layers:
            _add_to(layer.linear.weight, layer)
        yield model
    finally:
        for (_, layer), source in zip(layers, sources, strict=True):
            expand_into(layer.linear.weight, source)


def _can_merge(layer: LoRALinear, stored: nn.Module) -> bool:
    """Whether the layer is dense, can be expanded again, and is a plain sum."""
    return (
        "scales" in stored and "scales" not in layer.linear and type(layer) in OWN_LAYERS.values()
    )


def _add_to(weight: mx.array, layer: LoRALinear) -> None:
    """Put the LoRA into a weight, [out, in] or [experts, out, in]; some experts at a time."""
    if weight.ndim == 2:
        weight += ((layer.scale * layer.lora_b.T) @ layer.lora_a.T).astype(weight.dtype)
        mx.eval(weight)
        return
    for some in in_parts(weight):
        update = (layer.scale * layer.lora_b[some]) @ layer.lora_a[some]
        merged_some = weight[some] + update.astype(weight.dtype)
        mx.eval(merged_some)  # before it is put in: a graph that reads the weight would copy it
        weight[some] = merged_some
        mx.eval(weight)
