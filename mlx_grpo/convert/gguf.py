"""GGUF (llama architecture) to mlx-lm weights, configuration and tokenizer; no value changes.

Only tensor types that MLX reads exactly are accepted; K-quants are not (MLX decodes Q4_K wrongly
without a word). Format: ggml's `docs/gguf.md`.
"""

import json
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.core.errors import InputError, one_line

GGUF_GROUP_SIZE = 32
EXACT_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16"}
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# value types of GGUF metadata: struct codes; 8 is a string, 9 an array
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def tensor_types(path: Path) -> dict[str, int]:
    """ggml type number of every tensor, read from the file's header.

    Raises:
        InputError: not a GGUF file, or its header is damaged or cut short.
    """
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty; fetch it again")
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        try:
            return _walk_header(data)
        except (struct.error, UnicodeDecodeError, RecursionError):
            raise InputError(
                f"{path}: damaged or incomplete GGUF header; fetch the file again"
            ) from None


def _walk_header(data: mmap.mmap) -> dict[str, int]:
    position = 4

    def take(code: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, data, position)
        position += struct.calcsize("<" + code)
        return value

    def string() -> str:
        nonlocal position
        length = take("Q")
        if position + length > len(data):
            raise struct.error
        position += length
        return data[position - length : position].decode()

    def skip(kind: int) -> None:
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        elif kind in SCALARS:
            take(SCALARS[kind])
        else:
            raise struct.error

    take("I")
    tensors, pairs = take("Q"), take("Q")
    for _ in range(pairs):
        string()
        skip(take("I"))
    types = {}
    for _ in range(tensors):
        name = string()
        for _ in range(take("I")):
            take("Q")
        types[name] = take("I")
        take("Q")
    return types


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, Any]]:
    """Return (config.json, weights under mlx-lm names, GGUF metadata).

    Raises:
        InputError: another architecture than llama, or a tensor type that MLX does not read
            exactly.
    """
    if part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name):
        raise InputError(
            f"{path}: one of {int(part[2])} parts of a split GGUF; put them together with "
            "llama-gguf-split --merge, and give the result"
        )
    for name, kind in tensor_types(path).items():
        if kind not in EXACT_TYPES:
            raise InputError(
                f"{path}: tensor '{name}' has ggml type {kind}, which MLX does not read exactly; "
                f"use a file with {', '.join(EXACT_TYPES.values())}"
            )
    try:
        weights, metadata = mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"{path}: damaged or incomplete ({one_line(e)}); fetch it again") from None
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{path}: GGUF architecture '{architecture}' is not supported; use 'llama'"
        )
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(f"{path}: its rotary scaling is not converted; use the original model")
    try:
        config = _config(metadata, weights)
    except (KeyError, AttributeError, TypeError) as e:
        raise InputError(f"{path}: metadata is missing or of a wrong type: {one_line(e)}") from None
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    renamed = {}
    for name, value in weights.items():
        if ".attn_q." in name or ".attn_k." in name:
            value = _unpermuted(path, name, value, heads if ".attn_q." in name else kv_heads)
        renamed[_mlx_name(path, name)] = value
    mx.eval(renamed)
    return config, renamed, metadata


def _mlx_name(path: Path, name: str) -> str:
    parts = name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    stem, leaf = parts[-2], parts[-1]
    if stem not in TENSOR_NAMES:
        raise InputError(f"{path}: tensor '{name}' has no place in a llama model of mlx-lm")
    return f"{prefix}{TENSOR_NAMES[stem]}.{leaf}"


def _unpermuted(path: Path, name: str, rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's order of rotary rows, (h, d/2, 2) to (h, 2, d/2); packed rows too."""
    if not heads or rows.shape[0] % (2 * heads):
        raise InputError(f"{path}: tensor '{name}' has {rows.shape[0]} rows for {heads} heads")
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(metadata: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in weights,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
    }
    bits = {
        name.removesuffix(".scales"): 8
        * weights[name.removesuffix("scales") + "weight"].nbytes
        // (scales.size * GGUF_GROUP_SIZE)
        for name, scales in weights.items()
        if name.endswith(".scales")
    }
    if bits:
        default = min(bits.values())
        config["quantization"] = {"group_size": GGUF_GROUP_SIZE, "bits": default} | {
            _mlx_name(Path("GGUF"), f"{name}.weight").removesuffix(".weight"): {
                "group_size": GGUF_GROUP_SIZE,
                "bits": b,
            }
            for name, b in bits.items()
            if b != default
        }
    return config


def write_tokenizer(metadata: dict[str, Any], directory: Path, source: Path) -> None:
    """Rebuild a byte-level BPE tokenizer from GGUF metadata as Hugging Face files.

    Raises:
        InputError: a tokenizer model or pre-tokenizer this function does not rebuild exactly.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise InputError(
            f"{source}: tokenizer '{kind}' with pre-tokenizer '{pre}' is not supported"
        )
    try:
        _write_byte_level(metadata, directory, pre)
    except Exception as e:  # the tokenizers library raises plain exceptions
        raise InputError(f"{source}: damaged tokenizer metadata: {one_line(e)}") from e


def _write_byte_level(metadata: dict[str, Any], directory: Path, pre: str) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if pre == "smollm"
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # ggml's token types
    token_types = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=kind == control, normalized=False)
            for t, kind in zip(tokens, token_types, strict=True)
            if kind in (control, user_defined)
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = metadata["llama.context_length"].item()
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id.item()]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
