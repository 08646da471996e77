"""Preference pairs: read, gathered by prompt, and split into training, choosing and measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import PreferencePair
from mlx_grpo.data.chat import answer_tokens, prompt_tokens, row_messages
from mlx_grpo.data.jsonl import read_jsonl

SPLITS = ("train", "valid", "test")


def load_pairs(path: Path, tokenizer: Any, max_tokens: int) -> tuple[list[PreferencePair], int]:
    """Read preference pairs; those beyond `max_tokens`, prompt included, are left out and counted.

    Optional fields `chosen_finish_reason` and `rejected_finish_reason` (`stop` or `length`) tell
    answers that ended by themselves from answers that were cut off, `split` (`train`, `valid` or
    `test`) says what a pair is for.
    """
    pairs: list[PreferencePair] = []
    sides: dict[tuple[int, ...], tuple[str, str]] = {}
    too_long = 0
    for place, row in read_jsonl(path):
        prompt_ids = prompt_tokens(place, tokenizer, row_messages(place, row))
        answers = []
        for side in ("chosen", "rejected"):
            text, reason = row.get(side), row.get(f"{side}_finish_reason", "stop")
            if text is None:
                raise InputError(f"{place}: field '{side}' is missing")
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{place}: field '{side}' must be a text that is not empty")
            if reason not in ("stop", "length"):
                raise InputError(
                    f"{place}: field '{side}_finish_reason' must be 'stop' or 'length'"
                )
            answers.append(answer_tokens(tokenizer, text, reason))
        if answers[0] == answers[1]:
            raise InputError(
                f"{place}: 'chosen' and 'rejected' are the same answer; remove the row"
            )
        split = _pair_split(
            place, row, *sides.setdefault(prompt_ids, (place, row.get("split", "")))
        )
        if len(prompt_ids) + max(map(len, answers)) > max_tokens:
            too_long += 1
            continue
        identifier = str(row.get("id", place.rsplit(":", 1)[1]))
        pairs.append(PreferencePair(identifier, prompt_ids, answers[0], answers[1], split))
    if not pairs:
        raise InputError(
            f"{path}: no usable pairs ({too_long} longer than {max_tokens} tokens); see "
            "--max-length"
        )
    return pairs, too_long


def _pair_split(place: str, row: dict[str, Any], first: str, expected: Any) -> str:
    """What a pair is for; a prompt on two sides would make the held-out figures worthless."""
    split = row.get("split", "")
    if split not in ("", *SPLITS):
        raise InputError(f"{place}: field 'split' must be one of {', '.join(SPLITS)}")
    if split != expected:
        raise InputError(
            f"{place}: field 'split' is '{split}', but the same prompt has '{expected}' at {first}"
        )
    return str(split)


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
