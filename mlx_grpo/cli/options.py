"""What commands share: an option per field of a configuration class, and --quiet."""

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mlx_grpo.config.other_names import ours_for
from mlx_grpo.config.settings import flag_of
from mlx_grpo.config.sources import field_help, field_types
from mlx_grpo.console.output import Console

T = TypeVar("T")
ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file with any of these settings, e.g. batch_size = 8.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as key=value; wins over --config.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")]


def with_models(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that loads models, and transformers without PyTorch.

    mlx-lm imports transformers for its tokenizers, and that PyTorch where it is installed: half of
    a start, for nothing. It looks for it once, so PyTorch is out of sight for that moment only, and
    only in a process that is ours from the beginning.
    """

    @functools.wraps(command)
    def run(*args: Any, **named: Any) -> Any:
        if not {"torch", "transformers"} & sys.modules.keys():
            sys.modules["torch"] = None  # type: ignore[assignment]
            ui = Console(quiet=named.get("quiet", False))
            if os.environ.get("MLX_RANK", "0") != "0":
                ui.mute()  # the first rank says it
            try:
                with ui.working("starting"):
                    import mlx_lm  # noqa: F401
            finally:
                del sys.modules["torch"]
        return command(*args, **named)

    return run


def called_here(error: Any) -> str:
    """What to type for a flag that other trainers have and this command does not; or nothing.

    Args:
        error: click's usage error.
    """
    typed = getattr(error, "option_name", "")
    ours = ours_for(typed)
    known = [name for p in error.ctx.command.params for name in p.opts] if error.ctx else []
    if not ours or flag_of(ours[0]) not in known:
        return ""
    note = f", {ours[1]}" if ours[1] else ""
    return f"No such option: {typed}; here it is {flag_of(ours[0])}{note}"


def with_flags(
    cls: type, repeated: tuple[str, ...] = ()
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command one option per field of a configuration class.

    The function receives those that were given, as `flags`.

    Args:
        repeated: fields whose option may be given several times.
    """

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        kinds = typing.get_type_hints(command, include_extras=True)
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kinds[p.name])
            for p in list(inspect.signature(command).parameters.values())[1:]
        ]
        options = [
            _option(cls, field.name, field.default, field.name in repeated) for field in fields(cls)
        ]
        names = [option.name for option in options]

        def wrapper(**arguments: Any) -> T:
            given = {n: arguments.pop(n) for n in names}
            return command({n: v for n, v in given.items() if v not in (None, [])}, **arguments)

        wrapper.__doc__ = command.__doc__
        wrapper.__name__ = command.__name__
        wrapper.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*options, *own)}
        return wrapper

    return decorate


def _option(cls: type, name: str, default: Any, repeated: bool) -> inspect.Parameter:
    kind = field_types(cls)[name]
    text = field_help(cls)[name]
    if typing.get_origin(kind) is typing.Literal:
        text += f" One of: {', '.join(typing.get_args(kind))}."
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    text += f" (default: {shown})" if shown else ""
    # read as text, so that one place checks types for flags and files
    plain = list[str] if repeated else str
    metavar = {int: "INT", float: "NUMBER", str: "TEXT"}.get(
        kind, "CHOICE" if "One of" in text else "LIST"
    )
    option = typer.Option(flag_of(name), help=text, show_default=False, metavar=metavar)
    annotation = Annotated[plain | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
