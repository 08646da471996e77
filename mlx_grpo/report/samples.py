"""Answers of a run to read side by side, sorted by reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stats import evenly
from mlx_grpo.report.health import Row
from mlx_grpo.report.record import held_out_answers, sampled_answers
from mlx_grpo.run import log
from mlx_grpo.run.directory import run_settings

Answer = tuple[str, str]
"""(what stands above it, its text)."""


@dataclass(frozen=True)
class Sheet:
    """A prompt with answers to it."""

    prompt: str
    answers: tuple[Answer, ...]


Found = tuple[str, Sheet]
"""(id of the prompt, its sheet)."""


@dataclass(frozen=True)
class Sheets:
    """What is shown of an iteration."""

    title: str
    shown: Sequence[Sheet]
    total: int
    """Prompts there are."""


def sheets(
    run: Path,
    iteration: int | None = None,
    prompt: str = "",
    held_out: bool = False,
    limit: int = 0,
) -> Sheets:
    """Answers of one iteration, by prompt.

    Sampled answers stand from the highest reward to the lowest, and so do the prompts, by their
    mean. Held-out answers stand beside the SFT model's, from the largest gain to the largest loss.

    Args:
        iteration: None: the last that has any.
        prompt: an id, or a part of the prompt; empty means all.
        limit: prompts at most, taken evenly from first to last; 0 means all.

    Raises:
        InputError: no run, no such iteration, no such prompt, or damage.
    """
    run_settings(run)
    rows = held_out_answers(run) if held_out else sampled_answers(run)
    steps = sorted({row["step"] for row in rows})
    step = _chosen(run, steps, iteration, held_out)
    found = _held_out(rows, step) if held_out else _sampled(rows, step)
    found = [(i, sheet) for i, sheet in found if prompt in (i, "") or prompt in sheet.prompt]
    if not found:
        raise InputError(
            f"--prompt: no prompt of iteration {step} has the id '{prompt}' or holds that text"
        )
    shown = evenly([sheet for _, sheet in found], limit or len(found))
    kind = "held-out answers" if held_out else "answers"
    return Sheets(f"{run}: {kind} of iteration {step}", shown, len(found))


def _chosen(run: Path, steps: Sequence[int], iteration: int | None, held_out: bool) -> int:
    if not steps:
        raise InputError(f"{run}: no answers yet; wait for the first iteration")
    if iteration is None:
        return steps[-1]
    if iteration not in steps:
        there = ", ".join(map(str, steps)) if held_out else f"{steps[0]} to {steps[-1]}"
        raise InputError(f"--iteration: no answers of iteration {iteration}; there are {there}")
    return iteration


def _sampled(rows: Sequence[Row], step: int) -> list[Found]:
    own = [row for row in rows if row["step"] == step]
    groups = [
        sorted(group, key=_reward, reverse=True)
        for _, group in groupby(own, key=lambda row: row["id"])
    ]
    groups.sort(key=lambda group: sum(map(_reward, group)) / len(group), reverse=True)
    return [(group[0]["id"], _sheet([(_label(row), row) for row in group])) for group in groups]


def _held_out(rows: Sequence[Row], step: int) -> list[Found]:
    first, now = ({row["id"]: row for row in rows if row["step"] == s} for s in (0, step))
    if not step:
        pairs = [[("SFT model", row)] for row in now.values()]
    else:
        after = f"iteration {step}"
        pairs = [[("SFT model", first[i]), (after, now[i])] for i in now if i in first]
    pairs.sort(key=lambda pair: _gain([row for _, row in pair]), reverse=True)
    return [
        (pair[0][1]["id"], _sheet([(f"{who}: {_label(row)}", row) for who, row in pair]))
        for pair in pairs
    ]


def _sheet(answers: Sequence[tuple[str, Row]]) -> Sheet:
    prompt = answers[0][1]["prompt"]
    return Sheet(prompt, tuple((label, row["completion"]) for label, row in answers))


def _gain(rows: Sequence[Row]) -> float:
    """What the last of the answers has over the first; the reward itself where there is one."""
    last, first = _reward(rows[-1]), _reward(rows[0])
    if len(rows) == 1 or not math.isfinite(last):
        return last
    return last - first if math.isfinite(first) else math.inf


def _reward(row: Row) -> float:
    """Of a row, for an order: one that is not finite comes last."""
    return -math.inf if row["reward"] is None else float(row["reward"])


def _label(row: Row) -> str:
    cut = ", cut off" if row.get("finish_reason") == "length" else ""
    return log.figure(row["reward"], "+.3f") + cut
