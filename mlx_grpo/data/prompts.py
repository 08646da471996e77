"""JSONL files to prompts and preference pairs; every complaint names file, line and field."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import Prompt
from mlx_grpo.data.chat import encoded, prompt_text, row_messages
from mlx_grpo.data.jsonl import read_jsonl

ROWS_AT_ONCE = 2000
"""Encoded together: enough for all processors, few enough for progress to be seen."""


@dataclass(frozen=True)
class PromptRow:
    """A row of a prompts file that no tokenizer has seen yet."""

    place: str
    """file:line, for complaints."""
    id: str
    messages: tuple[dict[str, str], ...]
    response: str | None
    fields: dict[str, Any]
    """What else the row holds."""


def load_prompts(path: Path, tokenizer: Any, max_tokens: int) -> tuple[list[Prompt], int]:
    """Read and tokenize prompts, see `tokenize_prompts`."""
    return tokenize_prompts(path, read_prompts(path), tokenizer, max_tokens)


def read_prompts(path: Path) -> list[PromptRow]:
    """Read prompts without a tokenizer.

    Raises:
        InputError: a bad row, or none.
    """
    rows: list[PromptRow] = []
    seen: dict[str, str] = {}
    for place, row in read_jsonl(path):
        messages = row_messages(place, row)
        identifier = str(row.get("id", place.rsplit(":", 1)[1]))
        if identifier in seen:
            raise InputError(
                f"{place}: field 'id' repeats '{identifier}' of {seen[identifier]}; ids must be "
                "unique"
            )
        seen[identifier] = place
        response = row.get("response")
        if response is not None and not (isinstance(response, str) and response.strip()):
            raise InputError(f"{place}: field 'response' must be a text that is not empty")
        fields = {k: v for k, v in row.items() if k not in ("id", "prompt", "messages", "response")}
        rows.append(PromptRow(place, identifier, messages, response, fields))
    if not rows:
        raise InputError(f"{path}: no prompts in it; give one JSON object a line")
    return rows


def tokenize_prompts(
    path: Path,
    rows: Sequence[PromptRow],
    tokenizer: Any,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Prompt], int]:
    """Prompts of a file; those beyond `max_tokens`, chat template included, are left out and
    counted.

    Args:
        progress: told (rows done, all rows) now and then.

    Returns:
        (prompts, number left out).

    Raises:
        InputError: the chat template refuses one, or nothing is left.
    """
    prompts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        if len(rows) > ROWS_AT_ONCE:
            progress(start, len(rows))
        part = rows[start : start + ROWS_AT_ONCE]
        texts = [prompt_text(row.place, tokenizer, row.messages) for row in part]
        for row, ids in zip(part, encoded(tokenizer, texts), strict=True):
            if len(ids) <= max_tokens:
                prompts.append(Prompt(row.id, row.messages, ids, row.response, row.fields))
    if not prompts:
        raise InputError(
            f"{path}: all {len(rows)} prompts are longer than {max_tokens} tokens; see "
            "--max-prompt-length"
        )
    return prompts, len(rows) - len(prompts)


def order(seed: int, epoch: int, n: int) -> list[int]:
    """The order in which an epoch visits n prompts."""
    return permutation(seed, "order", epoch, n=n)


def batch_indices(seed: int, iteration: int, batch_size: int, n: int) -> list[int]:
    """Prompts of an iteration: the epochs' orders end to end, cut into batches, none dropped."""
    first = iteration * batch_size
    epochs: dict[int, list[int]] = {}
    indices = []
    for position in range(first, first + batch_size):
        epoch, place = divmod(position, n)
        epochs.setdefault(epoch, order(seed, epoch, n))
        indices.append(epochs[epoch][place])
    return indices
