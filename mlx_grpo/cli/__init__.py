"""The command line: flags to configuration, errors to one line, nothing else. A file a command."""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mlx_grpo import __version__
from mlx_grpo.cli import (
    chat,
    convert,
    demo,
    doctor,
    eval_rm,
    evaluate,
    export,
    plan,
    report,
    runs,
    samples,
    train,
    train_rm,
)
from mlx_grpo.cli.options import called_here, with_models
from mlx_grpo.console.output import Console
from mlx_grpo.console.stream import bear_any_encoding
from mlx_grpo.core.errors import InputError

app = typer.Typer(
    help="GRPO for language models on Apple silicon.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, function: Callable[..., Any]) -> None:
    # a line of the docstring is no line of the help: that is as wide as the terminal
    help_text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
    app.command(name, help=help_text)(function)


_add("demo", with_models(demo.demo))
_add("convert", with_models(convert.convert))
_add("plan", with_models(plan.plan))
_add("train", with_models(train.train))
_add("train-rm", with_models(train_rm.train_reward_model))
_add("eval", with_models(evaluate.evaluate))
_add("eval-rm", with_models(eval_rm.evaluate_reward_model))
_add("chat", with_models(chat.chat))
_add("report", report.report)
_add("runs", runs.runs)
_add("samples", samples.samples)
_add("export", with_models(export.export))
_add("doctor", doctor.doctor)

UsageError: Any = typer.BadParameter.__mro__[
    1
]  # typer carries its own copy of click, which it does not export

INTERRUPTED = 130


def _version(show: bool) -> None:
    if show:
        Console().say(f"mlx-grpo {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """GRPO for language models on Apple silicon: one process, one copy of the weights."""


def main() -> int:
    """Entry point: 0 when done, 2 for bad input, 130 when interrupted.

    A command may return its exit code, or whether it came to its end.
    """
    bear_any_encoding()  # the help is typer's to print
    command = typer.main.get_command(app)
    try:
        code = command.main(prog_name="mlx-grpo", standalone_mode=False)
    except InputError as e:
        Console().error(str(e))
        return 2
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        Console().error(f"{place}{e.strerror or e}")
        return 2
    except UsageError as e:
        if message := e.format_message():  # empty where a missing command has shown the help
            Console().error(called_here(e) or f"{message.removesuffix('.')} (see --help)")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        Console().error("interrupted")
        return INTERRUPTED
    if isinstance(code, bool):  # what a signal ended early has said so itself
        return 0 if code else INTERRUPTED
    if code == INTERRUPTED:  # what typer makes of Ctrl-C, without a word
        Console().error("interrupted")
    return code if isinstance(code, int) else 0
