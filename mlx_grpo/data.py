"""JSONL files to prompts and preference pairs; every complaint names file, line and field."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.types import FinishReason, PreferencePair, Prompt

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "valid", "test")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for each line that is not blank.

    Raises:
        InputError: the file is missing, a line is not JSON or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(
                f"{path}:{number}: not valid JSON ({e.msg}; column {e.colno})"
            ) from None
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, deep nesting
            raise InputError(f"{path}:{number}: not usable JSON ({e})") from None
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell what no text can hold
            raise InputError(
                f"{path}:{number}: a \\ud... escape stands alone; surrogates come in pairs"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
        yield f"{path}:{number}", row


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


def row_messages(place: str, row: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The conversation of a row: its `messages`, or its `prompt` as one user message."""
    if "prompt" in row and "messages" in row:
        raise InputError(f"{place}: has both 'prompt' and 'messages'; keep one")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise InputError(f"{place}: field 'prompt' must be a text that is not empty")
        return ({"role": "user", "content": row["prompt"]},)
    messages = row.get("messages")
    if messages is None:
        raise InputError(f"{place}: field 'prompt' is missing (or 'messages')")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: field 'messages' must be a list that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(
                f"{place}: field 'messages[{i}].role' must be one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise InputError(
                f"{place}: field 'messages[{i}].content' must be a text that is not empty"
            )
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{place}: field 'messages' ends with the assistant; the last message must ask"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def prompt_tokens(
    place: str, tokenizer: Any, messages: tuple[dict[str, str], ...]
) -> tuple[int, ...]:
    """The chat template applied to the conversation, with the opening of an answer.

    Raises:
        InputError: the template refuses the conversation, as Gemma's does with a system message.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    except Exception as e:  # a template is a program from elsewhere, in its sandbox: anything
        raise InputError(f"{place}: the chat template refuses this conversation: {e}") from None
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def answer_tokens(
    tokenizer: Any, text: str, finish_reason: FinishReason = "stop"
) -> tuple[int, ...]:
    """Tokens of an answer as the policy would sample it, with a stop token unless cut off."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return (*ids, end_of_turn(tokenizer)) if finish_reason == "stop" else ids


def end_of_turn(tokenizer: Any) -> int:
    """The stop token with which the chat template closes an answer; Gemma's is not its `eos`.

    Raises:
        InputError: the template refuses a question with an answer.
    """
    whole = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(whole, tokenize=False, enable_thinking=False)
    except Exception as e:  # as above
        raise InputError(f"the chat template refuses a question with an answer: {e}") from None
    ids = tokenizer.encode(text, add_special_tokens=False)
    closing = [i for i in ids if i in tokenizer.eos_token_ids]
    return int(closing[-1] if closing else tokenizer.eos_token_id)


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
