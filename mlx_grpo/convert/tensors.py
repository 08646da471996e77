"""The tensors of a checkpoint on disk: read lazily, each with the file that holds it.

Only safetensors are read directly. A PyTorch `.bin` goes through `torch.load(weights_only=True)`,
which runs no code from the file, into a temporary safetensors file.
"""

import json
import math
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_regular
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.safetensors import safetensors_header

READABLE = {"F64", "F32", "F16", "BF16", "U32", "U8"}
"""Floats and packed weights; 8-bit floats come without a rule for their scales."""
LFS_POINTER = b"version https://git-lfs"
LARGEST_POINTER = 1024
MOST_TIMES = 4
"""Times a file's size that its tensors may take: those that share storage become several."""
LIMIT = 2.0**20
"""No trained weight is larger; one flipped bit in an exponent is."""


@dataclass(frozen=True)
class Tensors:
    """Arrays by the names the files give them, and which file each is in."""

    arrays: dict[str, mx.array]
    files: dict[str, Path]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to read, and the file of the source that it stands for."""

    path: Path
    source: Path


def tensor_files(directory: Path, stem: str, scratch: Path) -> list[TensorFile]:
    """The files `STEM*.safetensors` or, failing that, PyTorch's `.bin` files, translated.

    Args:
        stem: how the files' names begin: `model`, `adapter_model` or `adapters`.
        scratch: directory for what is translated from `.bin`.

    Raises:
        InputError: no such file, or one of several is missing.
    """
    files = [TensorFile(file, file) for file in _files(directory, stem, ".safetensors")]
    if not files:
        pickles = _files(directory, "pytorch_model" if stem == "model" else stem, ".bin")
        files = [TensorFile(safe_file(file, scratch), file) for file in pickles]
    if not files:
        raise InputError(
            f"{directory}: no {stem}*.safetensors here; save the model with transformers' or "
            "mlx-lm's save functions"
        )
    return files


def read_tensors(files: Iterable[TensorFile]) -> Tensors:
    """The tensors of safetensors files, lazily.

    Raises:
        InputError: a file is damaged, a tensor comes twice or has a dtype that is not read here.
    """
    arrays: dict[str, mx.array] = {}
    where: dict[str, Path] = {}
    for file in files:
        for name, info in safetensors_header(file.path).items():
            if info["dtype"] not in READABLE:
                raise InputError(
                    f"{file.source}: tensor '{name}' has dtype {info['dtype']}, which is not read "
                    "here; save the model in bfloat16"
                )
            if name in where:
                raise InputError(f"{file.source}: tensor '{name}' is in {where[name].name} as well")
            where[name] = file.source
        arrays |= mx.load(str(file.path))
    return Tensors(arrays, where)


def _files(directory: Path, stem: str, suffix: str) -> list[Path]:
    """The files of a checkpoint; every shard that an index or a name promises must be there."""
    index, whole = (directory / f"{stem}{suffix}{end}" for end in (".index.json", ""))
    if whole.is_file():  # as transformers does: an index beside it is of an older save
        _check_fetched(whole)
        return [whole]
    if not index.is_file():
        files = sorted(directory.glob(f"{stem}*{suffix}"))
        for file in files:
            _check_fetched(file)
            _check_count(file, len(files))
        return files
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise InputError(f"{index}: field 'weight_map' must give each tensor a file")
    for name, shard in shards.items():
        if Path(shard).name != shard:
            raise InputError(f"{index}: tensor '{name}' is listed as outside this directory")
        if not (directory / shard).is_file():
            raise InputError(f"{directory / shard}: missing; it holds tensor '{name}' ({index})")
    for shard in set(shards.values()):
        _check_fetched(directory / shard)
    if suffix == ".safetensors":
        headers = {s: safetensors_header(directory / s) for s in set(shards.values())}
        for name, shard in shards.items():
            if name not in headers[shard]:
                raise InputError(f"{directory / shard}: tensor '{name}' is missing ({index})")
    return [directory / shard for shard in sorted(set(shards.values()))]


def _check_fetched(file: Path) -> None:
    """Raise InputError for what `git clone` leaves where Git LFS was not installed."""
    if file.stat().st_size < LARGEST_POINTER and file.read_bytes().startswith(LFS_POINTER):
        raise InputError(
            f"{file}: a Git LFS pointer, not the file itself; type 'git lfs pull' in its "
            "directory, or give the Hub id"
        )


def written_by_mlx(directory: Path) -> bool:
    """Whether the weights were saved by MLX, so that mlx-lm is the source's own implementation."""
    for file in sorted(directory.glob("model*.safetensors")):
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        return (header.get("__metadata__") or {}).get("format") == "mlx"
    return False


def _check_count(file: Path, found: int) -> None:
    promised = re.search(r"-of-(\d+)\.", file.name)
    if promised and int(promised[1]) != found:
        raise InputError(
            f"{file}: one of {int(promised[1])} files, of which {found} are here; fetch the rest"
        )


def safe_file(file: Path, scratch: Path) -> Path:
    """A file as safetensors; a `.bin` is read without running any code that it may hold."""
    _check_fetched(file)
    if file.suffix == ".safetensors":
        return file
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(
            f"{file}: PyTorch's own format, which only PyTorch reads safely; pip install torch, or "
            "save the model as safetensors"
        ) from None
    _check_archive(file)
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises many kinds for a damaged or unsafe file
        reason = one_line(e).split(". ")[0]
        raise InputError(
            f"{file}: damaged, incomplete, or more than plain weights ({reason}); fetch it again"
        ) from None
    if not isinstance(values, dict) or not all(torch.is_tensor(v) for v in values.values()):
        raise InputError(f"{file}: holds something other than named tensors")
    written = 0
    for name, value in values.items():
        size = value.numel() * value.element_size()
        written += size
        if size > value.untyped_storage().nbytes() or written > MOST_TIMES * file.stat().st_size:
            raise InputError(f"{file}: tensor '{name}' is larger than what the file holds of it")
    target = scratch / f"{file.parent.name}-{file.stem}.safetensors"
    # tensors that share storage (tied embeddings) become two, as safetensors wants
    save_file({name: value.clone().contiguous() for name, value in values.items()}, target)
    return target


def _check_archive(file: Path) -> None:
    """Raise InputError for a `.bin` that unpacks to more than it is: PyTorch compresses nothing."""
    check_regular(file)
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # of the older kind, or damaged: PyTorch's own reader says which
    if size > file.stat().st_size:
        raise InputError(
            f"{file}: unpacks to {size:,} bytes, more than the file has; not PyTorch's"
        )


def check_values(name: str, value: mx.array, file: Path) -> None:
    """Raise InputError if a tensor holds NaN, infinity, or a number no weight can be."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return
    # two reductions need no second copy of the largest tensor; MLX's let a NaN through
    low, high = value.min().item(), value.max().item()
    if not (low >= -LIMIT and high <= LIMIT):
        finite = math.isfinite(low) and math.isfinite(high)
        what = f"values beyond {LIMIT:.0f}" if finite else "values that are not finite"
        raise InputError(f"{file}: tensor '{name}' holds {what}; the file is damaged")
