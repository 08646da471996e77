"""`mlx-grpo doctor`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_grpo.cli.options import Quiet
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError

if TYPE_CHECKING:  # mlx-lm takes two seconds to import: not for --help
    from mlx_grpo.doctor import Check


def doctor(
    weights: Annotated[Path, typer.Option(help="Directory of the converted models.")] = Path(
        "weights"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            help="Look at this model alone: whether it trains, and what of it gets a LoRA."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as a JSON list.")] = False,
    quiet: Quiet = False,
) -> int:
    """Examine this machine; for each problem what to type. Exit code 1 if there is one."""
    from mlx_grpo.doctor import examine, trains

    ui = Console(quiet and not as_json)
    if model and not model.is_dir():
        raise InputError(f"--model {model}: no such directory")
    findings = []
    for finding in [trains(model)] if model else examine(weights):
        findings.append(finding)
        if not as_json:
            _show(ui, finding)
    if as_json:
        ui.say(json.dumps([asdict(f) for f in findings], indent=2))
    problems = sum(f.level == "problem" for f in findings)
    if not as_json and not model:
        ui.say(f"{problems} problem{'s' * (problems != 1)} found")
    return int(problems > 0)


def _show(ui: Console, finding: "Check") -> None:
    remedy = f"; type: {finding.remedy}" if finding.remedy else ""
    if finding.level == "problem":
        ui.warn(f"{finding.subject}: {finding.text}{remedy}")
    else:
        ui.say(f"{finding.level:<6}{finding.subject:<18} {finding.text}{remedy}")
