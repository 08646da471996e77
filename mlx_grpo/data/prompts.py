"""Rows to prompts; every complaint names file, row and field."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key, permutation
from mlx_grpo.core.types import Prompt
from mlx_grpo.data.chat import encoded, prompt_text
from mlx_grpo.data.messages import Message, row_messages, with_system
from mlx_grpo.data.tables import Row, own_id, read_rows, row_number
from mlx_grpo.data.tools import Tools, told_of

KNOWN = ("id", "prompt", "messages", "conversations", "response")

ROWS_AT_ONCE = 2000
"""Encoded together: enough for all processors, few enough for progress to be seen."""


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


def read_prompts(
    path: Path, columns: Mapping[str, str] | None = None, system: str | None = None
) -> list[PromptRow]:
    """Read prompts without a tokenizer.

    Args:
        columns: what `prompt` and `response` are called in the file.
        system: the system message of every prompt in place of the rows' own; an empty one removes
            theirs, None keeps them.

    Raises:
        InputError: a bad row, or none.
    """
    found = list(read_rows(path, columns))
    if not found:
        raise InputError(f"{path}: no prompts in it; give one JSON object a line")
    rows = []
    for identifier, (place, row) in zip(_ids(found), found, strict=True):
        messages, response = row_messages(place, row), row.get("response")
        if system is not None:
            messages = with_system(place, messages, system)
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
        if (own := own_id(row)) is None:
            continue
        if own in given:
            raise InputError(
                f"{place}: field 'id' repeats '{own}' of {given[own]}; ids must be unique"
            )
        given[own] = place
    taken = set(given)
    found = []
    for count, (place, row) in enumerate(rows, 1):
        identifier = own_id(row)
        if identifier is None:
            number = row_number(place)
            identifier = f"row {count}" if number in taken else number  # another row's own id
            taken.add(identifier)
        found.append(identifier)
    return found


def tokenize_prompts(
    path: Path,
    rows: Sequence[PromptRow],
    tokenizer: Any,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    tools: Tools | None = None,
) -> tuple[list[Prompt], int]:
    """Prompts of a file; those beyond `max_tokens`, chat template included, are left out and
    counted.

    Args:
        progress: told (rows done, all rows) now and then.
        tools: that the model is told of.

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
        texts = [_text(tokenizer, row, tools) for row in part]
        for row, ids in zip(part, encoded(tokenizer, texts), strict=True):
            if len(ids) <= max_tokens:
                prompts.append(Prompt(row.id, row.messages, ids, row.response, row.fields))
    if not prompts:
        raise InputError(
            f"{path}: all {len(rows)} prompts are longer than {max_tokens} tokens; see "
            "--max-prompt-length"
        )
    return prompts, len(rows) - len(prompts)


def _text(tokenizer: Any, row: PromptRow, tools: Tools | None) -> str:
    if tools is None:
        return prompt_text(row.place, tokenizer, row.messages)
    schemas = tools.schemas if tools.native else ()
    return prompt_text(row.place, tokenizer, told_of(tools, row.messages), schemas)


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


SELDOM = 0.2
"""Weight of a prompt whose completions all had the same reward: it is visited less, never not."""


def prompt_weights(ids: Sequence[str], spreads: Mapping[str, float]) -> list[float]:
    """How much each prompt is preferred, from `SELDOM` to 1.

    A prompt that the model always or never gets right teaches nothing (Bae et al. 2025,
    arXiv:2504.03380). One that has not been visited counts like the most useful ones.

    Args:
        spreads: standard deviation of a prompt's scores when it was last visited, by id.
    """
    known = [spread for spread in spreads.values() if spread > 0]
    typical = sum(known) / len(known) if known else 1.0
    return [
        SELDOM + (1 - SELDOM) * min(spreads[i] / typical, 1.0) if i in spreads else 1.0 for i in ids
    ]


def weighted_indices(seed: int, iteration: int, size: int, weights: Sequence[float]) -> list[int]:
    """Different prompts for an iteration, drawn in proportion to their weights.

    The largest of u ** (1 / w), u uniform (Efraimidis & Spirakis 2006,
    doi:10.1016/j.ipl.2005.11.003). More prompts than there are: all of them, again and again.
    """
    indices: list[int] = []
    while len(indices) < size:
        drawn = key(seed, "prompts", iteration, len(indices))
        u_N = mx.random.uniform(shape=(len(weights),), key=drawn)
        ranked = mx.argsort(-mx.log(u_N) / mx.array(weights)).tolist()
        indices += [int(i) for i in ranked[: size - len(indices)]]
    return indices
