"""A model directory in mlx-lm's format: its files, its headers, and its model, read lazily."""

import glob
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_directory
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.manifest import file_stamp
from mlx_grpo.files.safetensors import safetensors_header

EXACT_UP_TO = "mlx_grpo_exact_up_to"
"""Field of a converted config.json: how many tokens mlx-lm computes as the source does."""
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
    check_weights(path)
    renamed = rope_fields(config)
    try:
        with _without_patterns(path) as plain:
            found: tuple[nn.Module, dict[str, Any]] = load_model(
                plain, lazy=True, model_config=renamed, trust_remote_code=False
            )
        found[0].freeze()  # here, because a class of mlx-lm is no whole module
    except Exception as e:  # the model code of mlx-lm asserts and raises what it likes
        raise InputError(f"{path}: cannot load the model: {one_line(e)}") from e
    return found


@contextmanager
def _without_patterns(path: Path) -> Iterator[Path]:
    """The path, or a link to it where its name holds what mlx-lm takes for a pattern ([v1], *)."""
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mlx-grpo-") as scratch:
        link = Path(scratch) / "model"
        link.symlink_to(path.resolve(), target_is_directory=True)
        yield link


def check_length(path: Path, config: Mapping[str, Any], tokens: int) -> None:
    """Raise InputError for texts longer than what mlx-lm computes as the model's source does."""
    limit = config.get(EXACT_UP_TO)
    if isinstance(limit, int) and tokens > limit:
        raise InputError(
            f"{path}: mlx-lm computes this model correctly for texts of up to {limit} tokens; "
            f"--max-prompt-length and --max-completion-length together allow {tokens}. Choose "
            "shorter ones, or convert it again with --allow-mismatch"
        )


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


def check_weights(path: Path) -> None:
    """Raise InputError where two files hold one tensor, as beside a copy kept under another name:
    mlx-lm reads every `model*.safetensors` and keeps what it reads last."""
    held: dict[str, Path] = {}
    for file in weight_files(path):
        for name in safetensors_header(file):
            if name in held:
                raise InputError(
                    f"{file}: tensor '{name}' is in {held[name].name} too; move the file that does "
                    "not belong to the model out of its directory"
                )
            held[name] = file


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

    Without them a model falls back to its family's defaults and is wrong without a word. Those of a
    multimodal model stand in its `text_config`.
    """
    text, parameters = config.get("text_config"), config.get("rope_parameters")
    if isinstance(text, dict) and (inner := rope_fields(text)):
        return {"text_config": {**text, **inner}}
    if not isinstance(parameters, dict) or not parameters:
        return {}
    local = parameters.get("sliding_attention") or {}
    main = parameters.get("full_attention") or parameters
    found: dict[str, Any] = {}
    if "rope_theta" in main:
        found["rope_theta"] = main["rope_theta"]
    if "partial_rotary_factor" in main:
        found["partial_rotary_factor"] = main["partial_rotary_factor"]
    # who computes "proportional" reads rope_parameters itself
    if (kind := main.get("rope_type", "default")) not in ("default", "proportional"):
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
