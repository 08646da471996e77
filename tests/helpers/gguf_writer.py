"""A GGUF v3 writer for tests: ggml's block formats written out from their definition."""

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import pre_tokenizers

from tests.helpers.tiny import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    tiny_config,
    tiny_model,
)

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12}
ALIGNMENT = 32
Packed = tuple[bytes, np.ndarray]


def pack(values: np.ndarray, kind: str) -> Packed:
    """(bytes of a tensor in a ggml type, the values they stand for in fp32)."""
    if kind in ("F32", "F16"):
        stored = values.astype(np.float32 if kind == "F32" else np.float16)
        return stored.tobytes(), stored.astype(np.float32)
    if kind not in ("Q4_0", "Q4_1", "Q8_0"):
        return bytes(values.size), values  # a type whose content no reader should come to see
    blocks = values.reshape(-1, 32)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    steps, shift = {"Q8_0": (127, 0), "Q4_0": (7, 8), "Q4_1": (15, 0)}[kind]
    scale = ((high - low if kind == "Q4_1" else largest) / steps).astype(np.float16)
    zero = (low if kind == "Q4_1" else 0 * low).astype(np.float16)
    limits = (-127, 127) if kind == "Q8_0" else (0, 15)
    codes = np.clip(np.rint((blocks - zero) / scale.astype(np.float32)) + shift, *limits)
    meant = (codes - shift) * scale.astype(np.float32) + zero.astype(np.float32)
    head = np.concatenate([scale, zero] if kind == "Q4_1" else [scale], axis=1).view(np.uint8)
    body = codes.astype(np.int8).view(np.uint8)
    if kind != "Q8_0":  # element i in the low half of byte i, element i + 16 in the high half
        body = body[:, :16] | (body[:, 16:] << 4)
    return np.concatenate([head, body], axis=1).tobytes(), meant.reshape(values.shape)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """Type number and content of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    items = [_value(v) for v in value]
    kind = items[0][:4] if items else struct.pack("<I", 8)
    return (
        struct.pack("<I", 9)
        + kind
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]]
) -> dict[str, np.ndarray]:
    """Write a file; return the values its tensors stand for."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(_string(k) + _value(v) for k, v in metadata.items())
    body, meant = b"", {}
    for name, (values, kind) in tensors.items():
        data, meant[name] = pack(values, kind)
        shape = values.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", TYPE_NUMBERS[kind], len(body))
        body += data + bytes(-len(data) % ALIGNMENT)
    path.write_bytes(header + bytes(-len(header) % ALIGNMENT) + body)
    return meant


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]


def metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of the tiny llama and its byte tokenizer."""
    config = tiny_config("llama")
    values = {
        "general.architecture": "llama",
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.context_length": config["max_position_embeddings"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


def gguf_name(name: str) -> str:
    """Name of an mlx-lm weight in GGUF."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


def reordered(name: str, rows: np.ndarray, back: bool = False) -> np.ndarray:
    """llama.cpp's order of rotary rows, (heads, 2, d/2) to (heads, d/2, 2), or back."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return rows
    split = rows.reshape(heads, -1, 2, rows.shape[1]) if back else rows.reshape(heads, 2, -1, 32)
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_tiny(path: Path, kind: str, **changes: Any) -> Any:
    """Write the tiny llama with its matrices in a ggml type; return the mlx-lm model that has the
    stored values."""
    model = tiny_model("llama", seed=3)
    # numbers that bf16 and fp16 both hold, so that 16 bits lose none of them
    rounded = {n: v.astype(mx.bfloat16) for n, v in tree_flatten(model.parameters())}
    parameters = {n: np.array(v.astype(mx.float32)) for n, v in rounded.items()}

    def kind_of(name: str, rows: np.ndarray) -> str:
        mixed = "Q8_0" if "embed" in name or "down" in name else "Q4_0"
        return "F32" if rows.ndim == 1 else mixed if kind == "mixed" else kind

    tensors = {gguf_name(n): (reordered(n, v), kind_of(n, v)) for n, v in parameters.items()}
    meant = write_gguf(path, metadata(**changes), tensors)
    stored = {n: mx.array(reordered(n, meant[gguf_name(n)], back=True)) for n in parameters}
    model.update(tree_unflatten(list(stored.items())))
    return model
