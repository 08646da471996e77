"""What the benchmarks of learning share: runs that are not done twice, answers of a policy."""

import argparse
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from bench.shapes import move_lora
from mlx_grpo.config.settings import FREE, ROUNDING, TrainConfig, flat_values
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.files.atomic import read_json
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.grpo.learner import Learner, first_state
from mlx_grpo.grpo.rollout import rollout
from mlx_grpo.grpo.state import RunState
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.run.directory import is_run, run_settings
from mlx_grpo.training.loop import train
from mlx_grpo.training.setup import load_learner

ANY_VALUE = {*FREE, *ROUNDING, "template_date"}
"""Settings in which a run that is there may differ from the one that is asked for."""
Marks = dict[str, list[float | None]]
"""What each source of rewards gave to each answer."""


def parser(
    about: str | None, choices: Iterable[str], seeds: Sequence[int], output: str
) -> argparse.ArgumentParser:
    """The arguments of a benchmark that trains several things with several seeds."""
    names = list(choices)
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", type=Path, default=Path("weights/sft-4bit"))
    found.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    found.add_argument("--only", nargs="+", choices=names, default=names)
    found.add_argument("--output", type=Path, default=Path(output))
    found.add_argument("--json", type=Path)
    return found


def earlier(file: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """What a file of results holds, if it says `about` of its settings; otherwise nothing."""
    before = read_json(file) if file and file.exists() else {}
    as_read = json.loads(json.dumps(about))  # tuples become lists
    return before if all(before.get(n) == v for n, v in as_read.items()) else {}


def finish(config: TrainConfig, ui: Console, title: str = "") -> None:
    """Train a run to its end, if it is not there.

    Raises:
        InputError: the run that is there has other settings.
        KeyboardInterrupt: it was stopped on the way.
    """
    run = config.run_directory
    if (run / "final").is_dir():
        _check_same(run, config)
        return
    if title:
        ui.say(title)
    if not train(config, ui, resume=is_run(run)):
        raise KeyboardInterrupt


def _check_same(run: Path, config: TrainConfig) -> None:
    then, asked = flat_values(run_settings(run)), flat_values(config)
    for field in (name for name in asked if name not in ANY_VALUE):
        if then[field] != asked[field]:
            raise InputError(f"{run}: has another {field}; remove it or give another --output")


def ready_to_time(config: TrainConfig, open_: ExitStack) -> tuple[Learner, RunState]:
    """A run in memory, before its first iteration; it is closed with the stack."""
    learner = load_learner(config, Console(quiet=True))
    open_.enter_context(closing(learner.evaluator.rewards))
    move_lora(learner.roles.actor.model, 1e-6, seed=1)  # one of zeros is not merged
    return learner, first_state(config)


def answered(
    evaluator: Evaluator, model: nn.Module, temperature: float
) -> tuple[list[Group], list[list[float]], Marks]:
    """One answer of a policy to each prompt: (groups, rewards [P][1], marks by source)."""
    backbone = evaluator.backbone
    with merged_for_rollout(backbone, model) as policy:
        groups = rollout(
            policy,
            backbone.tokenizer,
            backbone.stop_ids,
            evaluator.prompts,
            replace(evaluator.sampling, k=1, temperature=temperature),
            evaluator.seed,
            "judge",
            acting=evaluator.acting,
        )
    return groups, *evaluator.rewards(groups, never_stop)
