"""Damaged sources through the real command: refused in one line that names the place, exit code 2,
nothing left behind; a flipped bit that makes another plausible value is the only way through.

`pytest -s` prints how many were refused, here and in test_convert_bad_source, and how many flips no
reader can see.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.helpers.tiny import tiny_model

pytest.importorskip("torch")
pytest.importorskip("peft")

KINDS = ("sft", "sharded", "bin", "rm", "peft", "rm-peft", "gguf")
Convert = Callable[..., str | None]


Copy = Callable[[str], Path]


def flip(file: Path, bit: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_they_are_all_accepted(
    kind: str, convert_damaged: Convert, source_copy: Copy
) -> None:
    assert convert_damaged(kind, source_copy(kind), accepted="whole") is None


TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CUT = {
    "sft": ("model.safetensors", *TEXTS),
    "sharded": ("model-00002-of-*.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model.bin",),
    "rm": ("model.safetensors", "config.json"),
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "rm-peft": ("adapter_model.safetensors",),
    "gguf": ("m.gguf",),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k, names in CUT.items() for name in names]
)
def test_a_file_cut_short(
    kind: str, name: str, convert_damaged: Convert, source_copy: Copy
) -> None:
    for keep in (0.0, 1e-9, 0.02, 0.3, 0.6, 0.97, 1.0):
        source = source_copy(kind)
        file = next(source.glob(name))
        whole = file.read_bytes()
        last = len(whole.rstrip(b"\n")) - 1  # a text has lost nothing with its last line break
        file.write_bytes(whole[: min(int(np.ceil(len(whole) * keep)), last)])
        complaint = convert_damaged(kind, source)
        assert complaint is not None, keep


def header_length(file: Path) -> int:
    """Bytes of a file of weights before its data."""
    if file.suffix == ".gguf":
        floats = sum(v.size for _, v in tree_flatten(tiny_model("llama").parameters()))
        return file.stat().st_size - 4 * floats
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


FLIPPED_TEXTS = [
    ("sft", "config.json", 25),
    ("sft", "tokenizer.json", 12),
    ("sft", "tokenizer_config.json", 12),
    ("sft", "generation_config.json", 6),
    ("sharded", "model.safetensors.index.json", 15),
    ("peft", "adapter_config.json", 20),
    ("rm", "config.json", 10),
]


@pytest.mark.parametrize(("kind", "name", "count"), FLIPPED_TEXTS)
def test_a_bit_flipped_in_a_text(
    kind: str, name: str, count: int, convert_damaged: Convert, source_copy: Copy
) -> None:
    rng = np.random.default_rng(1)
    for _ in range(count):
        file = source_copy(kind) / name
        flip(file, int(rng.integers(8 * file.stat().st_size)))
        convert_damaged(kind, file.parent)


FLIPPED_HEADERS = [
    ("sft", "model.safetensors", 25),
    ("rm", "model.safetensors", 8),
    ("peft", "adapter_model.safetensors", 12),
    ("gguf", "m.gguf", 25),
]


@pytest.mark.parametrize(("kind", "name", "count"), FLIPPED_HEADERS)
def test_a_bit_flipped_in_a_header(
    kind: str, name: str, count: int, convert_damaged: Convert, source_copy: Copy
) -> None:
    rng = np.random.default_rng(2)
    for _ in range(count):
        file = source_copy(kind) / name
        flip(file, int(rng.integers(8 * header_length(file))))
        convert_damaged(kind, file.parent)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n, _ in FLIPPED_HEADERS])
def test_the_highest_bit_of_an_exponent_flipped_in_any_weight_is_seen(
    kind: str, name: str, convert_damaged: Convert, source_copy: Copy
) -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        file = source_copy(kind) / name
        start, width = header_length(file), 4 if kind in ("gguf", "peft") else 2
        data = file.read_bytes()
        assert (len(data) - start) % width == 0
        while True:  # a value other than zero whose exponent's highest bit is not set
            end = start + width * int(rng.integers((len(data) - start) // width)) + width
            if data[end - 1] & 0x7F and not data[end - 1] & 0x40:
                break
        flip(file, 8 * end - 2)
        complaint = convert_damaged(kind, file.parent)
        assert complaint is not None and "tensor '" in complaint and "damaged" in complaint


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n, _ in FLIPPED_HEADERS])
def test_any_other_bit_of_a_weight_is_seen_or_plausible(
    kind: str, name: str, convert_damaged: Convert, source_copy: Copy
) -> None:
    rng = np.random.default_rng(4)
    for _ in range(5):
        file = source_copy(kind) / name
        flip(file, int(rng.integers(8 * header_length(file), 8 * file.stat().st_size)))
        convert_damaged(kind, file.parent)
