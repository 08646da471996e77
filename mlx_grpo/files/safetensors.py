"""Safetensors files: headers without data, arrays written in one step and read at once."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_regular
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.atomic import fsync_path

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""Bits per value of the dtypes of safetensors."""
LONGEST_HEADER = 100_000_000
"""Bytes, as the format's own library allows."""


def safetensors_header(file: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets of a safetensors file, without its data.

    Raises:
        InputError: the header cannot be read.
    """
    check_regular(file)
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"header of {length:,} bytes")
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, info in header.items():
                begin, end = info["data_offsets"]
                if not 0 <= begin <= end:
                    raise ValueError(f"tensor '{name}' lies outside of the data")
                if 8 * (end - begin) != BITS[info["dtype"]] * math.prod(info["shape"]):
                    raise ValueError(f"tensor '{name}' has another size than its shape says")
                if 8 + length + end > file.stat().st_size:
                    raise ValueError(f"cut short within tensor '{name}'")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{file}: not a whole safetensors file ({one_line(e)})") from None
    return header


def save_arrays(path: Path, arrays: Parameters) -> None:
    """Write a safetensors file in one step: `mx.save_safetensors` overwrites in place and may fail
    midway."""
    temporary = path.with_name(f".{path.stem}.tmp.safetensors")
    with temporary.open("wb") as file:
        # a Python file raises OSError with its reason where MLX's own says "unable to write"
        mx.save_safetensors(file, arrays, metadata={"format": "mlx"})
    fsync_path(temporary)
    temporary.replace(path)


def load_arrays(path: Path) -> Parameters:
    """Read a safetensors file now, not lazily.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (FileNotFoundError, RuntimeError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({one_line(e)})") from e
    return arrays
