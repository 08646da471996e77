"""Logits are computed in fp32, so what computes them is held in it: the head's scales, or its
weights where it is not packed. A cast for each token and each chunk would cost more than it takes.
"""

import mlx.core as mx
import mlx.nn as nn

LEAVES = ("weight", "scales", "biases", "bias")


class HeadEmbedding(nn.Embedding):
    """An embedding that is the head too: it looks up in 16 bits and computes logits in fp32."""

    half: bool
    """Whether the blocks compute in fp16, not bf16; a tree that is copied cannot hold a dtype."""

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids).astype(mx.float16 if self.half else mx.bfloat16)


class QuantizedHeadEmbedding(nn.QuantizedEmbedding):
    """As `HeadEmbedding`, packed."""

    half: bool

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids).astype(mx.float16 if self.half else mx.bfloat16)


def hold_head_in_fp32(model: nn.Module, dtype: mx.Dtype) -> set[str]:
    """Cast the head of a model whose blocks compute in `dtype`; names of the arrays that are to
    stay as they are then. A block has none."""
    if dtype == mx.float32:
        return set()
    held = set()
    for name, module in _heads(model):
        for leaf in LEAVES:
            if leaf in module and mx.issubdtype(module[leaf].dtype, mx.floating):
                module[leaf] = module[leaf].astype(mx.float32)
                mx.eval(module[leaf])
                held.add(f"{name}.{leaf}")
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            packed = isinstance(module, nn.QuantizedEmbedding)
            # the class alone changes: the module keeps its name and place in every tree
            module.__class__ = QuantizedHeadEmbedding if packed else HeadEmbedding
            module.half = dtype == mx.float16
    return held


def _heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What computes the logits: linear layers outside the blocks that are as long as the
    vocabulary, or else the embeddings that are."""
    outside = [(n, m) for n, m in model.named_modules() if ".layers." not in f".{n}."]
    embeddings = [(n, m) for n, m in outside if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
    vocabulary = max((len(m.weight) for _, m in embeddings), default=0)
    linears = [(n, m) for n, m in outside if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    whole = [(n, m) for n, m in linears if len(m.weight) >= vocabulary > 0]
    return whole or [(n, m) for n, m in embeddings if len(m.weight) >= vocabulary]
