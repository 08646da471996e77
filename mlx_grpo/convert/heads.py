"""Reward heads as trainers write them, brought into one form.

`weight` [1, m] and optional `bias` [1] read the last hidden state, or what a first layer makes of
it: `relu.weight` [m, hidden] and `relu.bias`, named after the activation that follows.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.convert.tensors import TensorFile, Tensors, check_values, read_tensors, safe_file
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Parameters
from mlx_grpo.models.reward_model import ACTIVATIONS, REWARD_HEAD

PREFIXES = ("score", "reward_head", "v_head", "value_head", "regression_head", "rm_head", "value")
"""Where transformers, mlx-grpo, TRL, OpenRLHF, Eurus and UltraRM, and others keep the head."""
BESIDE = (REWARD_HEAD, "value_head.safetensors", "value_head.bin")
"""Files for the head alone: mlx-grpo's and LLaMA-Factory's."""
LAYERS = {
    ("", ""): None,
    ("0", "2"): "",  # the activation between them is in no file
    ("0", "3"): "",
    ("dense", "out_proj"): "tanh",
}
"""Names of the first and the last layer of a head, and the activation between."""
KNOWN_ACTIVATION = {"Qwen2ForRewardModel": "relu", "v_head.summary": "relu"}
"""Of Qwen2.5-Math-RM and of GRM, from their published code."""
FOREIGN = {
    "gating": "a multi-objective reward model with a gating network, such as ArmoRM",
    "regression_layer": "a multi-objective or quantile reward model, such as QRM",
    "quantile": "a quantile reward model",
}
"""What tensors of other kinds of reward models are called."""
ENCODERS = ("deberta", "roberta", "bert", "electra", "xlnet", "longformer", "t5", "modernbert")


def split_head(
    arrays: dict[str, mx.array], prefixes: Iterable[str] = PREFIXES
) -> tuple[dict[str, mx.array], dict[str, mx.array], str]:
    """(arrays without the head, tensors of the head by their full names, its prefix or "")."""
    for prefix in prefixes:
        # `v_head.summary` is TRL's; a trained `modules_to_save` was renamed before
        own = re.compile(rf"{re.escape(prefix)}(\.summary)?(\.(\d|dense|out_proj))?\.(weight|bias)")
        if head := {name: v for name, v in arrays.items() if own.fullmatch(name)}:
            return {n: v for n, v in arrays.items() if n not in head}, head, prefix
    return dict(arrays), {}, ""


def prefixes_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Prefixes to look for; OpenRLHF notes its own in the configuration."""
    named = config.get("value_head_prefix")
    return (named, *PREFIXES) if isinstance(named, str) and named else PREFIXES


def checked_head(
    place: Path,
    config: dict[str, Any],
    head: dict[str, mx.array],
    files: dict[str, Path],
    scratch: Path,
) -> Parameters:
    """The reward head in one form, from a source's tensors or a file of its own beside them.

    Raises:
        InputError: damaged values, or no head of one score.
    """
    if not head and (beside := head_beside(place, scratch)):
        head, files = beside[0], beside[1].files
        place = next(iter(files.values()), place)
        if place.name == REWARD_HEAD:  # its scores are final, whatever config.json still says
            config = {}
        if not head:
            raise InputError(f"{place}: tensor 'weight' is missing")
    for name, value in head.items():
        file = files.get(name, place)
        check_values(name, value, file)
        if name.endswith(("score.weight", "out_proj.weight")) and value.shape[:1] != (1,):
            raise _labels(file, name, value)
    parts = in_one_form(head, config, place) if head else {}
    for leaf, shape in (("weight", (1, -1)), ("bias", (1,))):
        value = parts.get(leaf)
        if value is not None and (value.ndim != len(shape) or value.shape[0] != 1):
            name = next((n for n in head if n.endswith(leaf)), leaf)
            raise _labels(files.get(name, place), name, value)
    return parts


def _labels(file: Path, name: str, value: mx.array) -> InputError:
    wanted = "[1]" if name.endswith("bias") else "[1, hidden_size]"
    return InputError(
        f"{file}: tensor '{name}' has shape {list(value.shape)}; the head of a reward model has "
        f"one label: {wanted}"
    )


def in_one_form(head: dict[str, mx.array], config: dict[str, Any], place: Path) -> Parameters:
    """A head under the names of this project, fp32, the mean and deviation of its scores folded in.

    Raises:
        InputError: more than one label, or an activation that no file tells.
    """
    if any(name.split(".")[0] in ACTIVATIONS for name in head):  # in this form already
        return {n.removeprefix("score."): v.astype(mx.float32) for n, v in head.items()}
    stems = sorted({name.rpartition(".")[0] for name in head})
    prefix = re.sub(r"\.(\d|dense|out_proj)$", "", stems[0])
    found = tuple(stem.removeprefix(prefix).removeprefix(".") for stem in stems)
    if len(found) == 1:
        found = ("", "") if not found[0] else found * 2
    if found not in LAYERS:
        raise InputError(
            f"{place}: the reward head has layers {', '.join(stems)}; one or two convert"
        )
    first, last = (f"{prefix}.{end}".removesuffix(".") for end in found)
    one = {leaf: head[f"{last}.{leaf}"] for leaf in ("weight", "bias") if f"{last}.{leaf}" in head}
    if LAYERS[found] is not None:
        activation = LAYERS[found] or _activation(prefix, config, place)
        one |= {
            f"{activation}.{leaf}": head[f"{first}.{leaf}"]
            for leaf in ("weight", "bias")
            if f"{first}.{leaf}" in head
        }
    return _normalized({n: v.astype(mx.float32) for n, v in one.items()}, config, place)


def _activation(prefix: str, config: dict[str, Any], place: Path) -> str:
    names = (*(config.get("architectures") or ()), prefix)
    known = next((KNOWN_ACTIVATION[n] for n in names if n in KNOWN_ACTIVATION), None)
    activation = config.get("reward_head_activation", known)
    if activation not in ACTIVATIONS:
        choices = ", ".join(sorted(ACTIVATIONS))
        raise InputError(
            f"{place}: the reward head '{prefix}' has two layers, and no file tells which function "
            f'is between them; put "reward_head_activation" into config.json, one of {choices}'
        )
    return str(activation)


def _normalized(head: Parameters, config: dict[str, Any], place: Path) -> Parameters:
    """OpenRLHF gives (score - mean) / std and keeps both numbers in config.json."""
    if config.get("normalize_reward", True) is False or "weight" not in head:
        return head
    mean, std = (_number(config.get(name)) for name in ("mean", "std"))
    if mean is None or std is None:
        return head
    if std <= 0:
        raise InputError(f"{place}: field 'std' of the scores must be above 0, not {std}")
    bias = head.get("bias", mx.zeros((1,)))
    return {**head, "weight": head["weight"] / std, "bias": (bias - mean) / std}


def _number(value: Any) -> float | None:
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, int | float) else None


def head_beside(directory: Path, scratch: Path) -> tuple[dict[str, mx.array], Tensors] | None:
    """A head in a file of its own beside a model or an adapter."""
    for name in BESIDE:
        if (directory / name).is_file():
            file = safe_file(directory / name, scratch)
            stored = read_tensors([TensorFile(file, directory / name)])
            plain = {n: v for n, v in stored.arrays.items() if "." not in n}
            named = {f"score.{n}": v for n, v in plain.items() if n in ("weight", "bias")}
            own = {n: v for n, v in stored.arrays.items() if n.split(".")[0] in ACTIVATIONS}
            if own:
                return {**named, **own}, stored
            return split_head(stored.arrays)[1] or named, stored
    return None


def what_else(config: dict[str, Any], arrays: Iterable[str]) -> str | None:
    """What a source without a head of one score is, where its names tell."""
    architecture = str((config.get("architectures") or [""])[0])
    family = str(config.get("model_type") or "").lower()
    if any(family.startswith(encoder) for encoder in ENCODERS):
        return f"an encoder ({family}); reward models here are decoders that mlx-lm has"
    if "TokenClassification" in architecture or "ProcessReward" in architecture:
        return f"{architecture}, which scores steps or tokens (a process reward model), not answers"
    for part, what in FOREIGN.items():
        if any(part in name for name in arrays):
            return f"{what}; its scores come from several numbers, and one head is wanted here"
    return None
