"""Load a model directory once; hand out module trees that share its arrays."""

import copy
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from mlx_grpo.backend.precision import ComputePolicy, apply_policy, choose_policy
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.manifest import file_stamp, verify_manifest

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""Bits per value of the dtypes of safetensors."""


Stamps = tuple[tuple[int, int, int], ...]
"""Of the weight files of a model directory: they change with the files."""


@dataclass(frozen=True)
class Backbone:
    """Frozen weights with their tokenizer; the model itself serves as the reference policy."""

    path: Path
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    policy: ComputePolicy
    stamps: Stamps = ()
    """Of the weight files, as they were read."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return frozenset(self.tokenizer.eos_token_ids)

    def packed(self) -> nn.Module:
        """The model as it is stored, from its files; lazy.

        Raises:
            InputError: they are not what they were when this backbone was loaded.
        """
        return load_unchanged(self.path, self.stamps)


def load_backbone(path: Path, policy: ComputePolicy | None = None) -> Backbone:
    """Load an mlx-lm directory, frozen and in the form of the compute policy.

    Raises:
        InputError: no such directory, damaged or unreadable weights, or a tokenizer without a chat
            template.
    """
    verify_manifest(path)
    stamps = weight_stamps(path)
    # the configuration that comes back has the stop tokens of generation_config.json
    model, config = load_lazily(path)
    policy = policy or choose_policy(parameter_count(path))
    with ThreadPoolExecutor(1) as beside:  # Python's work beside that of MLX, which waits for files
        reading = beside.submit(load_chat_tokenizer, path, config.get("eos_token_id"))
        _in_form(model, policy)
        tokenizer = reading.result()
    return Backbone(path, model, tokenizer, config, policy, stamps)


def load_alone(path: Path, policy: ComputePolicy | None = None) -> nn.Module:
    """As `load_backbone`, without the tokenizer."""
    verify_manifest(path)
    model, _ = load_lazily(path)
    _in_form(model, policy or choose_policy(parameter_count(path)))
    return model


def _in_form(model: nn.Module, policy: ComputePolicy) -> None:
    apply_policy(model, policy)
    model.freeze()
    model.eval()


def load_lazily(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model as it is stored and its configuration; MLX reads an array when it is evaluated.

    Raises:
        InputError: no model there, or one that cannot be loaded.
    """
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: no model here (config.json is missing); make one with 'mlx-grpo convert'"
        )
    renamed = rope_fields(read_json(path / "config.json"))
    try:
        found: tuple[nn.Module, dict[str, Any]] = load_model(path, lazy=True, model_config=renamed)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as e:
        raise InputError(f"{path}: cannot load the model: {one_line(e)}") from e
    return found


def weight_stamps(path: Path) -> Stamps:
    """The stamps of a model directory as it is now."""
    return tuple(map(file_stamp, weight_files(path)))


def load_unchanged(path: Path, stamps: Stamps) -> nn.Module:
    """A model as it is stored, lazily, whose files were read before.

    Raises:
        InputError: they are not what they were when the stamps were taken.
    """
    try:
        if weight_stamps(path) == stamps:
            return load_lazily(path)[0]
    except FileNotFoundError:
        pass
    raise InputError(
        f"{path}: the weights were changed while they were in use; start again with the new ones, "
        "or with the old ones in their place"
    )


def load_chat_tokenizer(path: Path, eos_token_ids: Any = None) -> Any:
    """mlx-lm's wrapper of the tokenizer in `path`.

    Args:
        eos_token_ids: what ends an answer, where it is more than the tokenizer's own.

    Raises:
        InputError: damaged files, or no chat template.
    """
    try:
        tokenizer = load_tokenizer(path, eos_token_ids=eos_token_ids)
    except Exception as e:  # the tokenizers library raises plain exceptions for a damaged file
        raise InputError(f"{path}: cannot load the tokenizer: {one_line(e)}") from e
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{path}/tokenizer_config.json: no chat template; use an instruction-tuned model, or "
            "put one into chat_template.jinja beside it"
        )
    return tokenizer


def rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers 5 (`rope_parameters`) under the names mlx-lm reads.

    Without them a model falls back to its family's defaults and is wrong without a word.
    """
    parameters = config.get("rope_parameters")
    if not parameters:
        return {}
    local = parameters.get("sliding_attention") or {}
    main = parameters.get("full_attention") or parameters
    found: dict[str, Any] = {}
    if "rope_theta" in main:
        found["rope_theta"] = main["rope_theta"]
    if "partial_rotary_factor" in main:
        found["partial_rotary_factor"] = main["partial_rotary_factor"]
    if (kind := main.get("rope_type", "default")) != "default":
        # some families of mlx-lm look for the kind under its older name
        scaling = {k: v for k, v in main.items() if k not in ("rope_theta", "sliding_attention")}
        found["rope_scaling"] = {**scaling, "type": kind}
    if "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    return {k: v for k, v in found.items() if config.get(k) is None}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, in a fixed order."""
    return sorted(path.glob("model*.safetensors"))


def parameter_count(path: Path) -> int:
    """Number of weights of a model directory, packed ones counted one by one, from the files'
    headers alone."""
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for file in weight_files(path):
        for name, info in safetensors_header(file).items():
            shapes[name], dtypes[name] = info["shape"], info["dtype"]
    quantization = read_json(path / "config.json").get("quantization", {})
    total = 0
    for name, shape in shapes.items():
        if name.endswith((".scales", ".biases")) and name.rsplit(".", 1)[0] + ".weight" in shapes:
            continue
        bits = 32
        if dtypes[name] == "U32":
            module = quantization.get(name.removesuffix(".weight"))
            bits = module["bits"] if isinstance(module, dict) else quantization.get("bits", 4)
        total += math.prod(shape) * 32 // bits
    return total


def safetensors_header(file: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets of a safetensors file, without its data.

    Raises:
        InputError: the header cannot be read.
    """
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, info in header.items():
                begin, end = info["data_offsets"]
                if 8 * (end - begin) != BITS[info["dtype"]] * math.prod(info["shape"]):
                    raise ValueError(f"tensor '{name}' has another size than its shape says")
                if 8 + length + end > file.stat().st_size:
                    raise ValueError(f"cut short within tensor '{name}'")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file}: not a whole safetensors file ({one_line(e)})") from None
    return header


def fingerprint(path: Path) -> str:
    """Digest of all weights of a model directory: names, dtypes, shapes and bytes, whatever the
    sharding."""
    digests: dict[str, str] = {}
    for file in weight_files(path):
        header = safetensors_header(file)
        with file.open("rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            for name, info in header.items():
                begin, end = info["data_offsets"]
                f.seek(start + begin)
                digest = hashlib.sha256(f"{name} {info['dtype']} {info['shape']} ".encode())
                digest.update(f.read(end - begin))
                digests[name] = digest.hexdigest()
    if not digests:
        raise InputError(f"{path}: no model*.safetensors here")
    return hashlib.sha256(
        "".join(f"{n} {digests[n]}\n" for n in sorted(digests)).encode()
    ).hexdigest()


def share(model: nn.Module) -> nn.Module:
    """A second module tree that holds the same arrays: modules can be replaced in it, no weight is
    copied."""
    arrays = {id(value): value for _, value in tree_flatten(model.parameters())}
    return copy.deepcopy(model, arrays)
