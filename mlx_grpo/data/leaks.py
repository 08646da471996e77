"""Prompt files that cannot show what they are meant to: held-out prompts that are trained on too,
and files whose prompts are nearly all the same."""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_grpo.data.messages import Message
from mlx_grpo.data.prompts import PromptRow

FEWEST_DISTINCT = 0.5
"""Share of a file's prompts that must differ; below it the file is warned about."""

Conversation = tuple[tuple[str, str, str], ...]
"""(role, text, what else there is) of each message."""


def leak_warnings(
    train_file: str | Path,
    trained: Sequence[PromptRow],
    file: str | Path,
    held_out: Sequence[PromptRow],
    fields: bool = False,
) -> Iterator[str]:
    """One line for each thing that is wrong with training and held-out prompts.

    Prompts count as the same whatever their case, spaces and Unicode form.

    Args:
        fields: whether prompts of other fields differ, because an environment is made of them.
    """
    training = [_plain(row, fields) for row in trained]
    asked = [_plain(row, fields) for row in held_out]
    yield from _repeats(train_file, training, "the policy learns from these alone")
    yield from _repeats(file, asked, "the held-out figures rest on these alone")
    places = {plain: row.place for plain, row in zip(training, trained, strict=True)}
    found = [(row, plain) for row, plain in zip(held_out, asked, strict=True) if plain in places]
    if not found:
        return
    exact = {_texts(row, fields) for row in trained}
    apart = sum(_texts(row, fields) not in exact for row, _ in found)
    rest = f", {apart} of them but for case and spaces" if apart else ""
    first, same = found[0]
    yield (
        f"{file}: {len(found)} of {len(held_out)} held-out prompts are also trained on{rest} "
        f"({first.place} is {places[same]}), so the held-out figures do not show what the run does "
        "on new prompts; remove them from one of the two files"
    )


def chosen_by_warnings(
    file: str | Path,
    judging: Sequence[PromptRow],
    chose_file: str | Path,
    chose: Sequence[PromptRow],
    fields: bool = False,
) -> Iterator[str]:
    """A line where prompts that judge a run choose its best/ adapter as well.

    Args:
        fields: see `leak_warnings`.
    """
    chosen = {_plain(row, fields) for row in chose}
    same = sum(_plain(row, fields) in chosen for row in judging)
    if same:
        yield (
            f"{file}: {same} of its {len(judging)} prompts choose best/ as well (from "
            f"{chose_file}), so the results are slightly optimistic; use others to judge it"
        )


def _repeats(file: str | Path, prompts: Sequence[Conversation], matter: str) -> Iterator[str]:
    distinct = len(set(prompts))
    if distinct < FEWEST_DISTINCT * len(prompts):
        what = "are all the same" if distinct == 1 else f"are only {distinct} different ones"
        yield f"{file}: its {len(prompts)} prompts {what}; {matter}, so add others"


def _texts(row: PromptRow, fields: bool = False) -> Conversation:
    said = tuple((m["role"], m["content"], _rest(m)) for m in row.messages)
    return (*said, ("", "", _json(row.fields))) if fields else said


def _rest(message: Message) -> str:
    """Tool calls, a name and the like."""
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return _json(rest)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _plain(row: PromptRow, fields: bool) -> Conversation:
    """The conversation without what a reader would not see as a difference."""
    return tuple(
        (role, " ".join(unicodedata.normalize("NFKC", text).casefold().split()), rest)
        for role, text, rest in _texts(row, fields)
    )
