"""What the files of a run must hold to be read, and which mlx-grpo wrote them."""

from collections.abc import Mapping
from importlib.metadata import version
from types import NoneType
from typing import Any

from packaging.version import InvalidVersion, Version

from mlx_grpo.core.errors import InputError

Kind = tuple[type, ...]
NUMBER: Kind = (int, float)
MAYBE: Kind = (int, float, NoneType)
"""null stands for what is not finite, or not there yet."""
FIGURE: Kind = (int, float, NoneType, bool)
TABLE: Kind = (dict,)
TEXT: Kind = (str,)
WHOLE: Kind = (int,)
WORDS = {
    NUMBER: "a number",
    MAYBE: "a number or null",
    FIGURE: "a number or null",
    TABLE: "a table",
    TEXT: "a text",
    WHOLE: "a whole number",
    (bool,): "true or false",
}
STATE: dict[str, Kind] = {
    **dict.fromkeys(("iteration", "tokens_seen", "skipped_in_a_row", "evaluated"), WHOLE),
    **dict.fromkeys(("beta", "learning_rate"), NUMBER),
    **dict.fromkeys(("normalizer", "best", "config", "inputs", "versions", "logs"), TABLE),
}
"""Of state.json."""


def check_fields(place: str, row: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raise InputError unless the row has each of these fields, of its kind."""
    for name, kind in kinds.items():
        if name not in row:
            raise InputError(
                f"{place}: field '{name}' is missing; restore the file, or use the version of "
                "mlx-grpo that wrote it"
            )
        check_kind(place, name, row[name], kind)


def check_kind(place: str, name: str, value: Any, kind: Kind) -> None:
    """Raise InputError unless a field's value is of its kind."""
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
        raise InputError(f"{place}: field '{name}' must be {WORDS[kind]}, not {str(value)[:40]!r}")


def check_state(place: str, state: Mapping[str, Any]) -> None:
    """Raise InputError unless state.json has all that a run goes on from."""
    check_fields(place, state, STATE)
    check_fields(f"{place}: normalizer", state["normalizer"], {"mean": MAYBE, "std": MAYBE})
    value = "perplexity" if "perplexity" in state["best"] else "value"  # older states
    check_fields(f"{place}: best", state["best"], {"step": MAYBE, value: MAYBE})
    since = {"peak": MAYBE, "without_gain": WHOLE}
    check_fields(place, state, {name: kind for name, kind in since.items() if name in state})
    for name, size in state["logs"].items():
        check_kind(f"{place}: logs", name, size, WHOLE)


def check_not_newer(place: str, state: Mapping[str, Any]) -> None:
    """Raise InputError if a newer mlx-grpo than this one wrote a state.json."""
    versions, own = state.get("versions"), version("mlx-grpo")
    wrote = versions.get("mlx-grpo") if isinstance(versions, dict) else None
    try:
        newer = isinstance(wrote, str) and Version(wrote) > Version(own)
    except InvalidVersion:
        return
    if newer:
        raise InputError(
            f"{place}: made by mlx-grpo {wrote}, which is newer than this one, {own}; type: "
            "pip install --upgrade mlx-grpo"
        )
