"""Preference pairs: read, gathered by prompt, and split into training, choosing and measuring."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import FinishReason, PreferencePair
from mlx_grpo.data.chat import answer_tokens, end_of_turn, prompt_tokens
from mlx_grpo.data.messages import Message, pair_conversation
from mlx_grpo.data.tables import own_id, read_rows, row_number

SPLITS = ("train", "valid", "test")
SIDES = ("chosen", "rejected")
REASONS = ("chosen_finish_reason", "rejected_finish_reason")
KNOWN = ("id", "prompt", "messages", "conversations", *SIDES, *REASONS, "split")
EQUAL, EMPTY = "with equal answers", "with an empty answer"


@dataclass(frozen=True)
class PairRow:
    """A row of a pairs file that no tokenizer has seen yet."""

    place: str
    """file:line, for complaints."""
    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_finish_reason: FinishReason = "stop"
    rejected_finish_reason: FinishReason = "stop"
    split: str = ""
    """`train`, `valid` or `test`, where the file says so."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What else the row holds."""

    @property
    def unusable(self) -> str | None:
        """Why nothing can be learned from it."""
        if not self.chosen.strip() or not self.rejected.strip():
            return EMPTY
        same = self.chosen_finish_reason == self.rejected_finish_reason
        return EQUAL if same and self.chosen == self.rejected else None


def read_pairs(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[PairRow]:
    """Read preference pairs without a tokenizer; see `messages.pair_conversation` for their shapes.

    Optional fields `chosen_finish_reason` and `rejected_finish_reason` (`stop` or `length`) tell
    answers that ended by themselves from answers that were cut off, `split` (`train`, `valid` or
    `test`) says what a pair is for.

    Args:
        columns: what `prompt`, `chosen` and `rejected` are called in the file.

    Raises:
        InputError: a bad row.
    """
    for place, row in read_rows(path, columns):
        messages, answers = pair_conversation(place, row)
        split = row.get("split") or ""
        if split not in ("", *SPLITS):
            raise InputError(f"{place}: field 'split' must be one of {', '.join(SPLITS)}")
        identifier = own_id(row) or row_number(place)
        fields = {k: v for k, v in row.items() if k not in KNOWN}
        yield PairRow(
            place,
            identifier,
            messages,
            answers["chosen"],
            answers["rejected"],
            _reason(place, row, "chosen"),
            _reason(place, row, "rejected"),
            split,
            fields,
        )


def _reason(place: str, row: dict[str, Any], side: str) -> Any:
    reason = row.get(f"{side}_finish_reason") or "stop"
    if reason not in ("stop", "length"):
        raise InputError(f"{place}: field '{side}_finish_reason' must be 'stop' or 'length'")
    return reason


def load_pairs(
    path: Path, tokenizer: Any, max_tokens: int, columns: Mapping[str, str] | None = None
) -> tuple[list[PreferencePair], Counter[str]]:
    """Read and tokenize preference pairs. Those beyond `max_tokens`, prompt included, and those
    whose answers are equal or empty are left out.

    Returns:
        (pairs, number left out by reason).

    Raises:
        InputError: a bad row, a prompt on two sides of a split, or no usable pair.
    """
    pairs: list[PreferencePair] = []
    sides: dict[tuple[int, ...], PairRow] = {}
    skipped: Counter[str] = Counter()
    stop, too_long = end_of_turn(tokenizer), f"longer than {max_tokens} tokens"
    for row in read_pairs(path, columns):
        if row.unusable:
            skipped[row.unusable] += 1
            continue
        prompt_ids = prompt_tokens(row.place, tokenizer, row.messages)
        _check_side(row, sides.setdefault(prompt_ids, row))
        chosen = answer_tokens(tokenizer, row.chosen, row.chosen_finish_reason, stop)
        rejected = answer_tokens(tokenizer, row.rejected, row.rejected_finish_reason, stop)
        if len(prompt_ids) + max(len(chosen), len(rejected)) > max_tokens:
            skipped[too_long] += 1
            continue
        pairs.append(PreferencePair(row.id, prompt_ids, chosen, rejected, row.split))
    if not pairs:
        found = told(skipped) if skipped else "it is empty"
        remedy = "; raise --max-length" if too_long in skipped else ""
        raise InputError(f"{path}: no usable pairs ({found}){remedy}")
    return pairs, skipped


def told(skipped: Mapping[str, int]) -> str:
    """What was left out, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())


def _check_side(row: PairRow, first: PairRow) -> None:
    """A prompt on two sides of a split would make the held-out figures worthless."""
    if row.split != first.split:
        raise InputError(
            f"{row.place}: field 'split' is '{row.split}', but the same prompt has "
            f"'{first.split}' at {first.place}"
        )


@dataclass(frozen=True)
class PairGroup:
    """All pairs of one prompt: distinct answers, and which beats which."""

    prompt_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    """(index of chosen, index of rejected)."""
    split: str = ""
    """What the file says: `train`, `valid`, `test`, or nothing."""


@dataclass(frozen=True)
class Split:
    """Prompts that are trained on, that choose the weights, and that only the figures see."""

    train: list[PairGroup]
    valid: list[PairGroup]
    test: list[PairGroup]


def group_pairs(pairs: Sequence[PreferencePair]) -> list[PairGroup]:
    """Gather pairs by prompt, in the order of first appearance."""
    by_prompt: dict[tuple[int, ...], list[PreferencePair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_ids, []).append(pair)
    groups = []
    for prompt_ids, members in by_prompt.items():
        answers: dict[tuple[int, ...], int] = {}
        for pair in members:
            for ids in (pair.chosen_ids, pair.rejected_ids):
                answers.setdefault(ids, len(answers))
        indices = tuple((answers[p.chosen_ids], answers[p.rejected_ids]) for p in members)
        groups.append(PairGroup(prompt_ids, tuple(answers), indices, members[0].split))
    return groups


def split_groups(
    groups: Sequence[PairGroup], valid_fraction: float, test_fraction: float, seed: int
) -> Split:
    """Divide prompts, never the pairs of one prompt.

    Where the file says `split`, that holds. A file that knows only `train` and `valid` keeps its
    `valid` for the figures; a share of its training prompts then chooses the weights.

    Raises:
        InputError: nothing would be left to train on, or to measure.
    """
    sides = {
        side: [g for g in groups if g.split == side] for side in ("", "train", "valid", "test")
    }
    test, valid, rest = sides["test"], sides["valid"], sides["train"] + sides[""]
    if valid and not test:
        test, valid = valid, []
    rest = [rest[i] for i in permutation(seed, "split", n=len(rest))]
    count = len(groups)
    if not test and not sides["train"]:
        test, rest = _first(rest, max(1, round(test_fraction * count)))
    if valid_fraction and not valid:
        valid, rest = _first(rest, max(1, round(valid_fraction * count)))
    if not rest or not test:
        raise InputError(
            f"pairs of {count} prompts leave none to {'measure' if rest else 'train on'} with "
            f"--valid-fraction {valid_fraction:g} and --test-fraction {test_fraction:g}; give more "
            "prompts or hold out fewer"
        )
    return Split(rest, valid, test)


def _first(groups: list[PairGroup], count: int) -> tuple[list[PairGroup], list[PairGroup]]:
    return groups[:count], groups[count:]


def pair_count(groups: Sequence[PairGroup]) -> int:
    """Pairs of all prompts."""
    return sum(len(g.pairs) for g in groups)
