"""Write the flags of each command into its page, docs/commands/COMMAND.md.

usage: python docs/generate.py

What stands above the marker of a page is written by hand and stays; below it are the flags, from
the program itself. A test fails while a page is behind the program.
"""

import re
import sys
from pathlib import Path
from typing import Any

import typer

from mlx_grpo.cli import app

PAGES = Path(__file__).parent / "commands"
MARKER = "<!-- below: written by docs/generate.py -->\n"


SHARED = {"plan": "train"}
"""Commands that take the options of another one, which stand on its page only."""


def commands() -> dict[str, Any]:
    """The program's commands by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def page(name: str, command: Any, now: str) -> str:
    """The page of a command, given what the file holds now."""
    by_hand = now.split(MARKER)[0] if MARKER in now else f"# mlx-grpo {name}\n\n{command.help}\n\n"
    return f"{by_hand}{MARKER}{flags(name, command)}"


def flags(name: str, command: Any) -> str:
    """Arguments and options as a table."""
    other = SHARED.get(name)
    known = [_row(p) for p in commands()[other].params] if other else []
    rows = [row for p in command.params if p.name != "help" and (row := _row(p)) not in known]
    head = ["## Flags", "", *([f"Those of [{other}]({other}.md#flags), and:", ""] if other else [])]
    return "\n".join([*head, "| | default | |", "|---|---|---|", *rows]) + "\n"


def _row(parameter: Any) -> str:
    help_text = " ".join((parameter.help or "").split())
    told = re.fullmatch(r"(.*) \(default: (.*)\)(\.?)", help_text)
    text, shown = (told[1] + told[3], told[2]) if told else (help_text, _default(parameter))
    if shown and not (told and told[3]):  # with a full stop it is prose, not a value
        shown = f"`{shown}`"
    names = "`, `".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = parameter.name.upper()
    return f"| `{names}` | {shown} | {text} |".replace("|  |", "| |")


def _default(parameter: Any) -> str:
    value = parameter.default
    if value in (None, False, "", ()) or callable(value):
        return ""
    return "on" if value is True else str(value)


def main() -> None:
    for name, command in commands().items():
        file = PAGES / f"{name}.md"
        now = file.read_text(encoding="utf-8") if file.exists() else ""
        file.write_text(page(name, command, now), encoding="utf-8")
    strangers = {f.stem for f in PAGES.glob("*.md")} - commands().keys()
    if strangers:
        sys.exit(f"pages of no command: {', '.join(sorted(strangers))}")


if __name__ == "__main__":
    main()
