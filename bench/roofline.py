"""The least a stage of a loaded model must move and do."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_grpo.models.lora import Parameters


@dataclass(frozen=True)
class Work:
    """What a model costs: matrix weights and stored bytes of blocks and head, adapter weights."""

    block_weights: int
    block_bytes: int
    head_weights: int
    head_bytes: int
    lora_weights: int
    cache_bytes: int
    """Keys and values of one token."""

    def of(
        self, stage: str, rows: int, groups: int, prompt: int, completion: int
    ) -> tuple[float, float]:
        """(bytes, FLOPs) a stage cannot do without."""
        tokens = rows * completion
        seen = tokens + prompt * groups
        blocks, adapters = 2 * self.block_weights * seen, 2 * self.lora_weights * seen
        head = 2 * self.head_weights * tokens
        weights = self.block_bytes + self.head_bytes
        if stage == "rollout":
            kept = rows * completion * (prompt + completion / 2) * self.cache_bytes
            return completion * weights + kept, blocks + adapters + head
        if stage == "reward":
            return groups * self.block_bytes, blocks + adapters
        if stage == "log-prob":
            return groups * weights, blocks + head
        # forward, the same again block by block, gradient of the inputs (and of A and B)
        return 3 * groups * weights, 3 * blocks + 4 * adapters + 2 * head


def work_of(model: nn.Module, adapter: Parameters) -> Work:
    """Count weights and bytes of a model without LoRA, and of its adapter."""
    linears = (nn.Linear, nn.QuantizedLinear)
    blocks = [m for b in model.layers for _, m in b.named_modules() if isinstance(m, linears)]
    head = model.get("lm_head") or model.model.embed_tokens
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    kept = sum(v.nbytes // v.shape[2] for c in caches for v in (c.keys, c.values))
    return Work(
        block_weights=sum(map(_weights, blocks)),
        block_bytes=sum(map(_bytes, blocks)),
        head_weights=_weights(head),
        head_bytes=_bytes(head),
        lora_weights=sum(v.size for v in adapter.values()),
        cache_bytes=kept,
    )


def _weights(module: nn.Module) -> int:
    packed = 32 // module.bits if "scales" in module else 1
    return int(module.weight.size * packed)


def _bytes(module: nn.Module) -> int:
    return sum(v.nbytes for _, v in tree_flatten(module.parameters()))
