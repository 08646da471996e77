"""Sizes of a model from its shapes alone: modules are built, no weight is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_grpo.core.errors import InputError
from mlx_grpo.files.safetensors import safetensors_header
from mlx_grpo.models.directory import load_lazily, parameter_count
from mlx_grpo.models.lora import targeted
from mlx_grpo.models.mlp_chunks import MLP

SCALES = (".scales", ".biases")


@dataclass(frozen=True)
class Footprint:
    """What of a model its memory follows from."""

    parameters: int
    packed_bytes: int
    """Of all weights as they are stored."""
    scale_values: int
    """Scales and biases of a quantized head, which are held in fp32."""
    all_scale_values: int
    """Scales and biases of all quantized weights."""
    blocks: int
    hidden: int
    mlp: int
    """Width of the MLP."""
    attention: int
    """Width of queries, keys and values together."""
    heads: int
    vocabulary: int
    block_weights: int
    """Of all linear layers of all blocks."""
    lora_width: int
    """Inputs plus outputs of all linear layers with a LoRA: values per rank, of all blocks."""
    cache_values: int
    """Keys and values of one token in all blocks."""
    embedding_bytes: int
    """Of the embedding as it is stored."""
    packed_block_bytes: int = 0
    """Of the quantized linear layers of all blocks."""

    def trained_blocks(self, layers: int) -> int:
        """Blocks with a LoRA, where the last `layers` get one; 0 means all."""
        return min(layers or self.blocks, self.blocks)

    def lora_bytes(self, rank: int, layers: int = 0) -> int:
        """A LoRA on every linear layer of the last `layers` blocks (0: all), fp32."""
        return 4 * rank * self.lora_width * self.trained_blocks(layers) // self.blocks


def footprint(path: Path, targets: Sequence[str] = ()) -> Footprint:
    """Of a model directory, from its configuration and headers.

    Args:
        targets: the linear layers that get a LoRA, see `targeted`; empty means all.

    Raises:
        InputError: no model there, or one that cannot be loaded.
    """
    return footprint_of(load_lazily(path)[0], parameter_count(path), targets)


def footprint_of(model: nn.Module, parameters: int, targets: Sequence[str] = ()) -> Footprint:
    """Of a model whose weights need not be evaluated: shapes cost no arithmetic.

    Raises:
        InputError: its blocks keep something else than keys and values of each token.
    """
    caches = make_prompt_cache(model)
    if not all(isinstance(cache, KVCache | RotatingKVCache) for cache in caches):
        kind = type(model).__module__.rsplit(".", 1)[-1]
        raise InputError(
            f"model type '{kind}' is not supported: its blocks do not keep keys and values alone"
        )
    block = model.layers[0]
    linears = {n: _shape(m) for n, m in block.named_modules() if _is_linear(m)}
    arrays = dict(tree_flatten(model.parameters()))
    logits = model(mx.zeros((1, 1), mx.int32), cache=caches)
    kv_shapes = [v.shape for c in caches for v in (c.keys, c.values)]
    mlp = [w for n, w in linears.items() if n.split(".")[0] == MLP]
    attention = [w for n, w in linears.items() if n.split(".")[0] != MLP]
    outward = sum(outputs for _, outputs in attention)
    hidden, embedding_bytes = _embedding(model)
    head_dim = kv_shapes[0][-1]
    last = attention[-1] if attention else (hidden, hidden)
    heads = getattr(getattr(model, "args", None), "num_attention_heads", last[0] // head_dim)
    return Footprint(
        parameters=parameters,
        packed_bytes=sum(v.nbytes for v in arrays.values()),
        scale_values=_largest(arrays, "scales") + _largest(arrays, "biases"),
        all_scale_values=sum(v.size for n, v in arrays.items() if n.endswith(SCALES)),
        blocks=len(model.layers),
        hidden=hidden,
        mlp=max((max(w) for w in mlp), default=0),
        attention=outward - hidden if attention else 0,
        heads=heads,
        vocabulary=logits.shape[-1],
        block_weights=sum(i * o for layer in model.layers for i, o in _linear_shapes(layer)),
        lora_width=_lora_width(model, targets),
        cache_values=sum(s[1] * s[3] for s in kv_shapes),
        embedding_bytes=embedding_bytes,
        packed_block_bytes=sum(_packed_bytes(layer) for layer in model.layers),
    )


def adapter_bytes(directory: Path) -> int:
    """Of a LoRA directory's arrays, which are held in fp32."""
    header = safetensors_header(directory / "adapters.safetensors")
    return sum(4 * math.prod(info["shape"]) for info in header.values())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def _linear_shapes(block: nn.Module) -> list[tuple[int, int]]:
    return [_shape(m) for _, m in block.named_modules() if _is_linear(m)]


def _lora_width(model: nn.Module, targets: Sequence[str]) -> int:
    shapes = [
        (name, sum(_shape(module)))
        for layer in model.layers
        for name, module in layer.named_modules()
        if _is_linear(module)
    ]
    wanted = set(targeted(sorted({name for name, _ in shapes}), targets))
    return sum(width for name, width in shapes if name in wanted)


def _packed_bytes(block: nn.Module) -> int:
    packed = [m for _, m in block.named_modules() if isinstance(m, nn.QuantizedLinear)]
    return sum(v.nbytes for m in packed for _, v in tree_flatten(m.parameters()))


def _shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or (rows last) an embedding, quantized or not."""
    outputs, columns = module.weight.shape
    return (columns * 32 // module.bits if "scales" in module else columns), outputs


def _embedding(model: nn.Module) -> tuple[int, int]:
    """(width, stored bytes) of the token embedding."""
    kinds = nn.Embedding | nn.QuantizedEmbedding
    found = next(m for _, m in model.named_modules() if isinstance(m, kinds))
    return _shape(found)[0], sum(v.nbytes for _, v in tree_flatten(found.parameters()))


def _largest(arrays: dict[str, mx.array], leaf: str) -> int:
    """Values of the largest array of that name."""
    return max((v.size for n, v in arrays.items() if n.endswith(f".{leaf}")), default=0)
