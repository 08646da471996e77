"""What commands share: an option per field of a configuration class, and --quiet."""

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mlx_grpo.config.other_names import ours_for
from mlx_grpo.config.presets import preset_names
from mlx_grpo.config.settings import REPEATED, SETTINGS, JsonObject, flag_of
from mlx_grpo.config.sources import field_help, field_types, setting_help, setting_types
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.limits import check_regular

T = TypeVar("T")
FIRST = (
    *("actor_model", "rm_model", "reward", "prompts", "eval_prompts", "output", "seed"),
    *("num_iterations", "K", "batch_size", "max_completion_length", "learning_rate"),
    "memory_limit",
)
"""Settings that most runs need."""
PANELS = {
    "model": "Model and adapter",
    "data": "Prompts",
    "rollout": "Rollout",
    "reward": "Rewards and advantages",
    "kl": "KL to the reference",
    "optimizer": "Loss and optimizer",
    "evaluation": "Evaluation",
    "run": "The run",
}
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with any of these settings, such as `batch_size = 8`, or the name of a "
        f"preset: {', '.join(preset_names())}."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file.")
]


def check_json_file(file: Path) -> None:
    """Raise InputError unless the file of --json can be written."""
    check_regular(file)
    if file.is_dir() or not file.parent.is_dir():
        found = "a directory; name a file" if file.is_dir() else "no such directory"
        raise InputError(f"--json {file}: {found}")


def check_needs(needed: str, there: object, **options: object) -> None:
    """Raise InputError for an option that was given and does nothing without another.

    Args:
        needed: the other's flag.
        there: its value.
        options: values by name; one that is false was not given.
    """
    for name, value in options.items():
        if value and not there:
            raise InputError(f"{flag_of(name)}: needs {needed}")


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


@dataclass(frozen=True)
class Flag:
    """An option that sets one setting."""

    name: str
    """The setting's flat name."""
    kind: Any
    default: Any
    text: str
    panel: str
    repeated: bool = False
    """Whether it may be given several times."""


def train_flags(*repeated: str) -> list[Flag]:
    """An option for every setting of a training run, those that most runs need first.

    Args:
        repeated: names whose option may be given several times, beside those that always may.
    """
    order = [*FIRST, *(name for name in SETTINGS if name not in FIRST)]
    kinds, texts = setting_types(), setting_help()
    return [
        Flag(
            name=s.flat,
            kind=kinds[s.flat],
            default=s.default,
            text=texts[s.flat],
            panel="Most used" if s.flat in FIRST else PANELS[s.section],
            repeated=s.flat in (*REPEATED, *repeated),
        )
        for s in map(SETTINGS.__getitem__, order)
    ]


def class_flags(cls: type) -> list[Flag]:
    """An option for every field of a flat configuration class."""
    kinds, texts = field_types(cls), field_help(cls)
    return [Flag(f.name, kinds[f.name], f.default, texts[f.name], "Options") for f in fields(cls)]


def with_flags(flags: Sequence[Flag]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command these options; it receives those that were given, as `flags`."""

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        kinds = typing.get_type_hints(command, include_extras=True)
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kinds[p.name])
            for p in list(inspect.signature(command).parameters.values())[1:]
        ]
        options = [_option(flag) for flag in flags]
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


def _option(flag: Flag) -> inspect.Parameter:
    text, default = flag.text, flag.default
    if typing.get_origin(flag.kind) is typing.Literal:
        text += f" One of: {', '.join(typing.get_args(flag.kind))}."
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    shown = "" if default is None else shown
    text += f" (default: {shown})" if shown else ""
    # read as text, so that one place checks types for flags and files
    plain = list[str] if flag.repeated else str
    names = {int: "INT", float: "NUMBER", str: "TEXT", str | None: "TEXT", JsonObject: "JSON"}
    metavar = names.get(flag.kind, "CHOICE" if "One of" in text else "LIST")
    option = typer.Option(
        flag_of(flag.name),
        help=text,
        show_default=False,
        metavar=metavar,
        rich_help_panel=flag.panel,
    )
    annotation = Annotated[plain | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        flag.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
