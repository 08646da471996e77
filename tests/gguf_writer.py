"""A GGUF v3 writer for tests: ggml's block formats written out from their definition."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

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
