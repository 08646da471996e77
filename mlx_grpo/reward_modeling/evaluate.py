"""Any reward model on any preference pairs: the figures of `quality.py`, and those by field."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_grpo.backend.device import limit_memory, recommended_memory
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, FinishReason, Group, Prompt
from mlx_grpo.data.chat import answer_tokens, end_of_turn, load_chat_tokenizer, prompt_tokens
from mlx_grpo.data.pairs import PairRow, read_pairs, told
from mlx_grpo.data.template import Template
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.reward_model import RewardModel, load_reward_model, reward_config
from mlx_grpo.reward_modeling.quality import (
    JudgedPair,
    Quality,
    Ranking,
    calibration_bins,
    calibration_error,
    probability,
    quality,
    ranking,
    show_by_field,
    show_quality,
)

MISSING = "(none)"
Progress = Callable[[str, int, int], None]
"""Told (what, done, total)."""


@dataclass(frozen=True)
class PairsWanted:
    """Which pairs a reward model is measured on."""

    file: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    """What `prompt`, `chosen` and `rejected` are called in the file."""
    split: str = ""
    """Only those that the file marks so."""
    limit: int = 0
    """First pairs to use; 0 means all."""
    max_length: int = 2048
    """Longer ones, prompt included, are left out and counted."""
    by: tuple[str, ...] = ()
    """Fields whose values get figures of their own."""


@dataclass(frozen=True)
class RewardEvaluation:
    """Figures of a reward model."""

    quality: Quality
    by: dict[str, dict[str, Ranking]]
    """Field, value, figures."""
    skipped: Counter[str]
    """Pairs left out, by reason."""
    stored_temperature: float | None
    """What the reward model says itself."""
    stored_error: float | None
    """Calibration error with it, which was fitted on other pairs."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        by = {f: {v: asdict(r) for v, r in values.items()} for f, values in self.by.items()}
        stored = {"temperature": self.stored_temperature, "calibration_error": self.stored_error}
        return {**asdict(self.quality), "by": by, "skipped": dict(self.skipped), "stored": stored}


def evaluate_rm(
    rm: Path, wanted: PairsWanted, actor: Path | None = None, progress: Progress = lambda *_: None
) -> RewardEvaluation:
    """Score every answer once and compare with the labels.

    Args:
        rm: directory of the reward model.
        actor: the model that a reward adapter was made for.

    Raises:
        InputError: no reward model, an adapter without its model, or no usable pairs.
    """
    config, rows = reward_config(rm), _rows(wanted)
    skipped = Counter(row.unusable for row in rows if row.unusable)
    date = (config.get("training") or {}).get("template_date", "")
    limit_memory(recommended_memory(), 0)
    backbone = (
        load_backbone(actor, template=Template(date))
        if actor and config["kind"] == "adapter"
        else None
    )
    model = load_reward_model(rm, backbone, date=date)
    tokenizer = backbone.tokenizer if backbone else load_chat_tokenizer(rm, date=date)
    asked: dict[str, list[PairRow]] = {}
    for row in rows:
        if not row.unusable:
            asked.setdefault(json.dumps(row.messages), []).append(row)
    kept: list[PairRow] = []
    judged: list[JudgedPair] = []
    for number, members in enumerate(asked.values()):
        progress("prompts", number, len(asked))
        usable, found = _judge(model, tokenizer, members, number, wanted.max_length)
        kept += usable
        judged += found
        if short := len(members) - len(usable):
            skipped[f"longer than {wanted.max_length} tokens"] += short
    if not judged:
        raise InputError(f"{wanted.file}: no usable pairs ({told(skipped) or 'it is empty'})")
    stored = config.get("temperature")
    error = None
    if stored:
        bins = calibration_bins([probability(p.difference, stored) for p in judged])
        error = calibration_error(bins)
    by = {name: _by_value(name, kept, judged) for name in wanted.by}
    return RewardEvaluation(quality(judged), by, skipped, stored, error)


def _rows(wanted: PairsWanted) -> list[PairRow]:
    rows = [
        row for row in read_pairs(wanted.file, wanted.columns) if wanted.split in ("", row.split)
    ][: wanted.limit or None]
    if not rows:
        which = f" of split '{wanted.split}'" if wanted.split else ""
        raise InputError(f"{wanted.file}: no pairs{which} in it")
    known = {name for row in rows for name in row.fields}
    if strange := [name for name in wanted.by if name not in known]:
        raise InputError(
            f"{wanted.file}: no row has the field '{strange[0]}' of --by; there are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return rows


def _judge(
    model: RewardModel, tokenizer: Any, rows: Sequence[PairRow], number: int, most: int
) -> tuple[list[PairRow], list[JudgedPair]]:
    """Those pairs of one prompt that are short enough, and what the model says of them."""
    first, stop = rows[0], end_of_turn(tokenizer)
    prompt_ids = prompt_tokens(first.place, tokenizer, first.messages)
    answers: dict[tuple[str, FinishReason], Completion] = {}
    for row in rows:
        for text, reason in _sides(row):
            ids = answer_tokens(tokenizer, text, reason, stop)
            answers.setdefault((text, reason), Completion(ids, text, reason, ()))
    fits = {k: c for k, c in answers.items() if len(prompt_ids) + len(c.token_ids) <= most}
    usable = [row for row in rows if all(side in fits for side in _sides(row))]
    if not usable:
        return [], []
    group = Group(Prompt(first.id, first.messages, prompt_ids), tuple(fits.values()))
    scores = dict(zip(fits, model.score(group), strict=True))
    judged = [
        JudgedPair(
            scores[chosen] - scores[rejected],
            len(fits[chosen].token_ids),
            len(fits[rejected].token_ids),
            number,
            chosen[1] == rejected[1] == "stop",
        )
        for chosen, rejected in map(_sides, usable)
    ]
    return usable, judged


def _sides(row: PairRow) -> tuple[tuple[str, FinishReason], tuple[str, FinishReason]]:
    chosen = (row.chosen, row.chosen_finish_reason)
    return chosen, (row.rejected, row.rejected_finish_reason)


def _by_value(
    name: str, rows: Sequence[PairRow], judged: Sequence[JudgedPair]
) -> dict[str, Ranking]:
    values: dict[str, list[JudgedPair]] = {}
    for row, pair in zip(rows, judged, strict=True):
        value = row.fields.get(name)
        values.setdefault(MISSING if value is None else str(value), []).append(pair)
    return {value: ranking(pairs) for value, pairs in values.items()}


def show_evaluation(ui: Console, found: RewardEvaluation, wanted: PairsWanted) -> None:
    """The tables of `train-rm`, and one for each field of --by."""
    if found.skipped:
        ui.warn(f"{wanted.file}: pairs skipped: {told(found.skipped)}")
    show_quality(ui, found.quality, str(wanted.file))
    if found.stored_temperature is not None and found.stored_error is not None:
        ui.say(
            f"with its stored temperature, {found.stored_temperature:.2f}, the calibration error "
            f"is {found.stored_error:.3f}"
        )
    for name, values in found.by.items():
        show_by_field(ui, name, values)
