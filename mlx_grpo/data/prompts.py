"""Rows to prompts; every complaint names file, row and field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import Prompt
from mlx_grpo.data.chat import prompt_tokens
from mlx_grpo.data.messages import Message, row_messages
from mlx_grpo.data.tables import Row, read_rows, row_number

KNOWN = ("id", "prompt", "messages", "conversations", "response")


@dataclass(frozen=True)
class PromptRow:
    """A row of a prompts file that no tokenizer has seen yet."""

    place: str
    """file:line, for complaints."""
    id: str
    messages: tuple[Message, ...]
    response: str | None
    fields: dict[str, Any]
    """What else the row holds."""


def load_prompts(
    path: Path, tokenizer: Any, max_tokens: int, columns: Mapping[str, str] | None = None
) -> tuple[list[Prompt], int]:
    """Read and tokenize prompts, see `read_prompts` and `tokenize_prompts`."""
    return tokenize_prompts(path, read_prompts(path, columns), tokenizer, max_tokens)


def read_prompts(path: Path, columns: Mapping[str, str] | None = None) -> list[PromptRow]:
    """Read prompts without a tokenizer.

    Args:
        columns: what `prompt` and `response` are called in the file.

    Raises:
        InputError: a bad row, or none.
    """
    found = list(read_rows(path, columns))
    if not found:
        raise InputError(f"{path}: no prompts in it; give one JSON object a line")
    rows = []
    for identifier, (place, row) in zip(_ids(found), found, strict=True):
        messages, response = row_messages(place, row), row.get("response")
        if response is not None and not (isinstance(response, str) and response.strip()):
            raise InputError(f"{place}: field 'response' must be a text that is not empty")
        fields = {k: v for k, v in row.items() if k not in KNOWN}
        rows.append(PromptRow(place, identifier, messages, response, fields))
    return rows


def _ids(rows: Sequence[Row]) -> list[str]:
    """The id of each row, its number where it has none.

    Raises:
        InputError: an id comes twice.
    """
    given: dict[str, str] = {}
    for place, row in rows:
        if row.get("id") in (None, ""):
            continue
        if (identifier := str(row["id"])) in given:
            raise InputError(
                f"{place}: field 'id' repeats '{identifier}' of {given[identifier]}; ids must be "
                "unique"
            )
        given[identifier] = place
    taken = set(given)
    found = []
    for count, (place, row) in enumerate(rows, 1):
        identifier = row_number(place) if row.get("id") in (None, "") else str(row["id"])
        if row.get("id") in (None, "") and identifier in taken:  # another row's own id
            identifier = f"row {count}"
        taken.add(identifier)
        found.append(identifier)
    return found


def tokenize_prompts(
    path: Path, rows: Sequence[PromptRow], tokenizer: Any, max_tokens: int
) -> tuple[list[Prompt], int]:
    """Prompts of a file; those beyond `max_tokens`, chat template included, are left out and
    counted.

    Returns:
        (prompts, number left out).

    Raises:
        InputError: the chat template refuses one, or nothing is left.
    """
    prompts = []
    for row in rows:
        ids = prompt_tokens(row.place, tokenizer, row.messages)
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
