"""Command-line flags and TOML files to one checked configuration, and back to TOML.

Flags win over the file, the file wins over the defaults. A TOML key is a field in the table of its
section (`[kl] targets = [0.05]`) or a setting's flat name, in any table or none (`kl_targets`).
"""

import ast
import difflib
import inspect
import json
import math
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mlx_grpo.config.checks import check
from mlx_grpo.config.other_names import ours_for
from mlx_grpo.config.presets import config_file
from mlx_grpo.config.settings import (
    SETTINGS,
    JsonObject,
    TrainConfig,
    flag_of,
    flat_values,
    train_config,
)
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.limits import read_bounded

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

LARGEST_TOML = 16 << 20
"""Bytes; every setting of a run takes ten thousand."""


@cache
def field_help(cls: type) -> dict[str, str]:
    """The docstring under each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = str(text.value.value)
    return texts


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field, evaluated."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


@cache
def setting_help() -> dict[str, str]:
    """The help text of every setting of a training run, by flat name."""
    return {s.flat: field_help(_section(s.section))[s.field] for s in SETTINGS.values()}


@cache
def setting_types() -> dict[str, Any]:
    """The type of every setting of a training run, by flat name."""
    return {s.flat: field_types(_section(s.section))[s.field] for s in SETTINGS.values()}


def _section(name: str) -> type:
    found: type = typing.get_type_hints(TrainConfig)[name]
    return found


def flat_name(place: str, key: str) -> str:
    """The flat name that a TOML key or an argument of the Python interface means.

    Raises:
        InputError: there is no such setting; a near one is suggested.
    """
    table, _, leaf = key.replace("-", "_").rpartition(".")
    for s in SETTINGS.values():
        if (table, leaf) == (s.section, s.field):
            return s.flat
    for name in (f"{table}_{leaf}".replace(".", "_"), leaf):
        if name.lstrip("_") in SETTINGS:
            return name.lstrip("_")
    wanted = key.replace(".", "_").replace("-", "_")
    ours = ours_for(wanted)
    near = [ours[0]] if ours else difflib.get_close_matches(wanted, SETTINGS, 1)
    hint = f"did you mean '{near[0]}'?" if near else "see mlx-grpo train --help"
    raise InputError(f"{place}: unknown setting '{key}'; {hint}")


def typed(place: str, kind: Any, value: Any) -> Any:
    """A value in a setting's type; a text is parsed.

    Raises:
        InputError: `place` and what it must be.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:  # `str | None`: None is what no flag and no file can say
        return None if value is None else typed(place, arguments[0], value)
    if kind is JsonObject:
        return _json_object(place, value)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{place}: must be one of {', '.join(arguments)}, not {value!r}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            items = [items]
        items = [i.strip() if isinstance(i, str) else i for i in items]
        return tuple(typed(place, arguments[0], i) for i in items if i != "")
    try:
        if kind is str and isinstance(value, str):
            value.encode()  # not a path of other bytes: config.toml could not hold it
            return value
        if kind is int and not isinstance(value, bool):
            if isinstance(value, (str, int)) or value == int(value):
                return _held(place, int(value), "64-bit integers", 0, 2**63 - 1)
        elif kind is float and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return _held(place, number, "32-bit floats", 1e-37, 1e38)
    except InputError:
        raise
    except (TypeError, ValueError, OverflowError):
        pass
    kept = " in UTF-8" if isinstance(value, str) and kind is str else ""
    raise InputError(f"{place}: must be {_TYPE_NAMES[kind]}{kept}, not {value!r}")


def _json_object(place: str, value: Any) -> str:
    """A JSON object in one form, whether it came as a text or as a table."""
    try:
        if value == "":
            return ""
        found = json.loads(value) if isinstance(value, str) else value
        if isinstance(found, dict):
            return json.dumps(found, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        pass
    raise InputError(f'{place}: must be a JSON object such as {{"a": 1}}, not {value!r}')


def _held(place: str, number: Any, by: str, least: float, most: float) -> Any:
    """A number of a size that what computes with it can hold; others become 0 or infinity there."""
    if number and not least <= abs(number) <= most:
        raise InputError(f"{place}: must be a number that {by} can hold, not {str(number)[:40]}")
    return number


_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a finite number"}


_TABLES = ("chat_template_kwargs",)
"""Keys whose value is a table."""


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and key.replace("-", "_") not in _TABLES
            else {f"{prefix}{key}": value}
        )
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Keys and values of a TOML file, tables flattened with dots.

    Raises:
        InputError: missing file, no regular or too large a file, or bad syntax.
    """
    try:
        return _flatten(tomllib.loads(read_bounded(path, LARGEST_TOML).decode("utf-8-sig")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # nesting without end, numbers of many digits
        raise InputError(f"{path}: not valid TOML: {e}") from None


def build_config(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, more_rewards: bool = False
) -> TrainConfig:
    """The configuration from a TOML file and from flags by flat name, checked.

    Args:
        more_rewards: see `check`.

    Raises:
        InputError: unknown setting, wrong type, or a value out of range.
    """
    values: dict[str, Any] = {}
    file = config_file(file) if file else None
    for key, value in (read_toml(file) if file else {}).items():
        name = flat_name(str(file), key)
        values[name] = typed(f"{file}: {key}", setting_types()[name], value)
    for name, value in (flags or {}).items():
        values[name] = typed(flag_of(name), setting_types()[name], value)
    if "lora_scale" not in values and values.get("lora_alpha"):
        rank = values.get("lora_rank", SETTINGS["lora_rank"].default)
        values["lora_scale"] = values["lora_alpha"] / max(rank, 1)
    config = train_config(**values)
    check(config, more_rewards)
    return config


def typed_flags(cls: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Command-line texts in the types of a flat dataclass's fields.

    Raises:
        InputError: a text that does not fit.
    """
    kinds = field_types(cls)
    return {n: typed(flag_of(n), kinds[n], value) for n, value in flags.items()}


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML: a table for each section, each field under its help text."""
    lines, section, values = [], "", flat_values(config)
    for s in SETTINGS.values():
        if s.section != section:
            section = s.section
            lines += [f"[{section}]"]
        # JSON's texts, numbers and lists are TOML's too, but for DEL
        written = json.dumps(values[s.flat], ensure_ascii=False).replace("\x7f", "\\u007f")
        line = f"# {s.field} is not set" if values[s.flat] is None else f"{s.field} = {written}"
        lines += [f"# {' '.join(setting_help()[s.flat].split())}", line, ""]
    return "\n".join(lines)
