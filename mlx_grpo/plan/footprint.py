"""Sizes of a model from its shapes alone: modules are built, no weight is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_grpo.files.safetensors import safetensors_header
from mlx_grpo.models.check import check_trainable
from mlx_grpo.models.directory import load_lazily, parameter_count
from mlx_grpo.models.families.gated_delta import has_gated_delta
from mlx_grpo.models.lora_targets import (
    EXPERTS,
    LATENT,
    LINEAR,
    Coverage,
    adapted_layers,
    coverage,
    experts_per_token,
    weight_count,
)
from mlx_grpo.models.mlp_chunks import MLP

SCALES = (".scales", ".biases")
MLPS = (MLP, "feed_forward", "block_sparse_moe", "ffn", "moe", "shared_mlp", "experts", "router")
"""Parts of a block that hold its MLP, as the families of mlx-lm call them."""
SHARED = 5
HEADS = ("num_attention_heads", "n_heads", "num_heads", "n_head", "attention_heads")


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
    """Of the quantized linear layers and experts of all blocks."""
    expert_lora_width: int = 0
    """Values per rank of a LoRA on each expert of all blocks."""
    active_experts: float = 0.0
    """Share of the experts that work on a token."""
    state_values: int = 0
    """Of a row's states in all blocks that do not grow with its tokens: windows, recurrences."""
    scan_values: int = 0
    """Of the largest recurrent state of a block."""
    scans_in_pieces: bool = False
    """Whether its gradient is taken in pieces of time (`models/families/gated_delta.py`)."""
    cuttable: bool = True
    """Whether its MLPs can run over some tokens at a time."""
    coverage: Coverage | None = None
    """What a LoRA reaches."""

    def trained_blocks(self, layers: int) -> int:
        """Blocks with a LoRA, where the last `layers` get one; 0 means all."""
        return min(layers or self.blocks, self.blocks)

    def lora_bytes(self, rank: int, layers: int = 0, expert_rank: int = 0) -> int:
        """A LoRA on every linear layer and expert of the last `layers` blocks (0: all), fp32."""
        values = rank * self.lora_width + expert_rank * self.expert_lora_width
        return 4 * values * self.trained_blocks(layers) // self.blocks

    def lora_values(self, rank: int, expert_rank: int) -> float:
        """Values of a LoRA on all blocks that work on a token."""
        experts = expert_rank * self.active_experts * self.expert_lora_width
        return rank * self.lora_width + experts


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
        InputError: it cannot be trained.
    """
    check_trainable(model)
    arrays = dict(tree_flatten(model.parameters()))
    states = _states(model)
    chosen = experts_per_token(model)
    widths = [_widths(block, chosen) for block in model.layers]
    hidden, embedding_bytes = _embedding(model)
    linears = [m for block in model.layers for m in _of_kind(block, (*LINEAR, *LATENT))]
    experts = [m for block in model.layers for m in _of_kind(block, EXPERTS)]
    adapted = adapted_layers(model, targets)
    active = chosen / max((m.num_experts for m in experts), default=1)
    return Footprint(
        parameters=parameters,
        packed_bytes=sum(v.nbytes for v in arrays.values()),
        scale_values=_largest(arrays, "scales") + _largest(arrays, "biases"),
        all_scale_values=sum(v.size for n, v in arrays.items() if n.endswith(SCALES)),
        blocks=len(model.layers),
        hidden=hidden,
        mlp=max(mlp for mlp, _ in widths),
        attention=max(0, max(outward for _, outward in widths) - hidden),
        heads=_heads(model) if states.per_token else 0,
        vocabulary=states.vocabulary,
        block_weights=sum(map(weight_count, linears))
        + int(active * sum(map(weight_count, experts))),
        lora_width=sum(sum(_shape(m)) for m in adapted if isinstance(m, LINEAR)),
        cache_values=states.per_token,
        embedding_bytes=embedding_bytes,
        packed_block_bytes=sum(map(_packed_bytes, [*linears, *experts])),
        expert_lora_width=sum(
            m.num_experts * sum(_shape(m)) for m in adapted if isinstance(m, EXPERTS)
        ),
        active_experts=active,
        state_values=states.fixed,
        scan_values=states.scan,
        scans_in_pieces=has_gated_delta(model),
        cuttable=all(MLP in block for block in model.layers),
        coverage=coverage(model),
    )


def adapter_bytes(directory: Path) -> int:
    """Of a LoRA directory's arrays, which are held in fp32."""
    header = safetensors_header(directory / "adapters.safetensors")
    return sum(4 * math.prod(info["shape"]) for info in header.values())


def _of_kind(block: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    return [m for _, m in block.named_modules() if isinstance(m, kinds)]


def _widths(block: nn.Module, chosen: int) -> tuple[int, int]:
    """(width of what an MLP holds of a token, outputs of all other linear layers).

    A mixture holds for each chosen expert what it reads and writes beside what is between. `SHARED`
    of that stands for the width of an MLP: a fit to measured blocks of Granite's shape.
    """
    linears = {n: _shape(m) for n, m in block.named_modules() if isinstance(m, LINEAR)}
    mlp = [max(w) for n, w in linears.items() if n.split(".")[0] in MLPS]
    outward = sum(w[1] for n, w in linears.items() if n.split(".")[0] not in MLPS)
    experts = [sum(_shape(m)) for m in _of_kind(block, EXPERTS)]
    return max(mlp, default=0) + chosen * sum(experts) // SHARED, outward


@dataclass(frozen=True)
class _States:
    """Values that a row leaves in the caches of all blocks."""

    per_token: int
    fixed: int
    scan: int
    vocabulary: int


def _states(model: nn.Module) -> _States:
    """From the shapes after two tokens."""
    caches = make_prompt_cache(model)
    logits = model(mx.zeros((1, 2), mx.int32), cache=caches)
    parts = [part for cache in caches for part in getattr(cache, "caches", [cache])]
    grow = [v for c in parts if hasattr(c, "keys") for v in (c.keys, c.values)]
    stay = [v for c in parts if not hasattr(c, "keys") for _, v in tree_flatten(c.state)]
    stay = [v for v in stay if isinstance(v, mx.array)]
    return _States(
        per_token=sum(v.shape[1] * v.shape[3] for v in grow if v is not None),
        fixed=sum(v.size for v in stay),
        scan=max((v.size for v in stay if v.ndim == 4), default=0),
        vocabulary=logits.shape[-1],
    )


def _heads(model: nn.Module) -> int:
    """Of attention, by the configuration, whatever a family calls them."""
    args = getattr(model, "args", None)
    inner = getattr(args, "text_config", None)
    inner = inner if isinstance(inner, dict) else vars(args) if args else {}
    found = (inner.get(n, getattr(args, n, None)) for n in HEADS)
    return next((n for n in found if isinstance(n, int)), 1)


def _packed_bytes(module: nn.Module) -> int:
    if "scales" not in module:
        return 0
    return sum(v.nbytes for _, v in tree_flatten(module.parameters()))


def _shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or (rows last) an embedding, quantized or not."""
    outputs, columns = module.weight.shape[-2:]
    return (columns * 32 // module.bits if "scales" in module else columns), outputs


def _embedding(model: nn.Module) -> tuple[int, int]:
    """(width, stored bytes) of the token embedding."""
    kinds = nn.Embedding | nn.QuantizedEmbedding
    found = next(m for _, m in model.named_modules() if isinstance(m, kinds))
    return _shape(found)[0], sum(v.nbytes for _, v in tree_flatten(found.parameters()))


def _largest(arrays: dict[str, mx.array], leaf: str) -> int:
    """Values of the largest array of that name."""
    return max((v.size for n, v in arrays.items() if n.endswith(f".{leaf}")), default=0)
