"""A model directory in mlx-lm's format: its files, its headers, and its model, read lazily."""

import hashlib
import math
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_directory
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.manifest import file_stamp
from mlx_grpo.files.safetensors import safetensors_header

Stamps = tuple[tuple[int, int, int], ...]
"""Of the weight files of a model directory: they change with the files."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_nextn_predict_layers")
MOST_LAYERS = 1024
"""The deepest models have 130."""


def load_lazily(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model as it is stored and its configuration; MLX reads an array when it is evaluated.

    Raises:
        InputError: no model there, or one that cannot be loaded.
    """
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: no model here (config.json is missing); make one with 'mlx-grpo convert'"
        )
    check_directory(path)
    config = read_json(path / "config.json")
    check_layers(path / "config.json", config)
    renamed = rope_fields(config)
    try:
        found: tuple[nn.Module, dict[str, Any]] = load_model(path, lazy=True, model_config=renamed)
    except Exception as e:  # the model code of mlx-lm asserts and raises what it likes
        raise InputError(f"{path}: cannot load the model: {one_line(e)}") from e
    return found


def check_layers(place: Path, config: dict[str, Any]) -> None:
    """Raise InputError for a number of layers that no model has: each is built as modules before
    its weights are missed."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in LAYERS:
            if isinstance(count := part.get(name), int | float) and count > MOST_LAYERS:
                raise InputError(
                    f"{place}: field '{name}' is {count}; a model has at most {MOST_LAYERS}"
                )


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
