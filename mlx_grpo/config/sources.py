"""TOML file, `--set` texts and command-line flags to one checked configuration, and back to TOML.

Precedence: flags, then `--set`, then the file, then the defaults. In TOML and in `--set` a table
name and a key join with an underscore: `[kl] control = "lr"`, `kl.control=lr` and `kl_control=lr`
say the same.
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
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mlx_grpo.config.checks import check
from mlx_grpo.config.other_names import ours_for
from mlx_grpo.config.settings import TrainConfig, flag_of
from mlx_grpo.core.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib


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


def _known(cls: type, key: str, place: str) -> str:
    name = key.replace(".", "_").replace("-", "_")
    names = [f.name for f in fields(cls)]
    if name not in names:
        ours = ours_for(name)
        near = [ours[0]] if ours else difflib.get_close_matches(name, names, 1)
        hint = f"did you mean '{near[0]}'?" if near else "see --help for the fields"
        raise InputError(f"{place}: unknown key '{key}'; {hint}")
    return name


def _coerce(place: str, name: str, kind: Any, value: Any) -> Any:
    """The value in the field's type; a text is parsed, a wrong type is refused."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise InputError(
                f"{place}: field '{name}' must be one of {', '.join(arguments)}, not {value!r}"
            )
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            items = [items]
        return tuple(_coerce(place, name, arguments[0], i) for i in items if i != "")
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is int and not isinstance(value, bool):
            if isinstance(value, str) or float(value) == int(value):
                return int(value)
        elif kind is float and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{place}: field '{name}' must be {_TYPE_NAMES[kind]}, not {value!r}")


_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a finite number"}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Keys and values of a TOML file, tables flattened with dots.

    Raises:
        InputError: missing file or bad syntax.
    """
    try:
        return _flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid TOML: {e}") from None


def build_config(
    file: Path | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration from a TOML file, `--set key=value` texts and command-line flags, checked.

    Raises:
        InputError: unknown key, wrong type, or a value out of range.
    """
    kinds = field_types(TrainConfig)
    values: dict[str, Any] = {}
    for key, value in (read_toml(file) if file else {}).items():
        name = _known(TrainConfig, key, str(file))
        values[name] = _coerce(str(file), name, kinds[name], value)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: write it as key=value")
        name = _known(TrainConfig, key.strip(), f"--set {text}")
        values[name] = _coerce(f"--set {text}", name, kinds[name], value.strip())
    config = TrainConfig(**{**values, **typed_flags(TrainConfig, flags or {})})
    check(config)
    return config


def typed_flags(cls: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Command-line texts in the types of the fields.

    Raises:
        InputError: a text that does not fit.
    """
    kinds = field_types(cls)
    return {n: _coerce(flag_of(n), n, kinds[n], value) for n, value in flags.items()}


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML, each field under its help text."""
    lines = []
    for name, value in asdict(config).items():
        # JSON's texts, numbers and lists are TOML's too, but for DEL
        written = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines += [f"# {' '.join(field_help(TrainConfig)[name].split())}", f"{name} = {written}", ""]
    return "\n".join(lines)
