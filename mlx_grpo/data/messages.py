"""Rows to conversations, in the shapes that data sets have them.

A prompt is a text, a list of messages (`prompt` or `messages`), or ShareGPT's `conversations`. The
answers of a preference pair are texts, or lists of messages with or without the prompt in them.
"""

import json
import re
from typing import Any

from mlx_grpo.core.errors import InputError

Message = dict[str, Any]
"""`role`, `content` (always a text), and what else a chat template may look at."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
TURN = re.compile(r"\n\n(Human|Assistant):")


def row_messages(place: str, row: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation of a row, up to the message that is to be answered.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    name, value = _prompt(place, row)
    if isinstance(value, str) and name == "prompt":
        if not value.strip():
            raise InputError(f"{place}: field '{name}' must be a text that is not empty")
        return ({"role": "user", "content": value},)
    messages = _messages(place, name, value)
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{place}: field '{name}' ends with the assistant; the last message must ask"
        )
    return messages


def with_system(place: str, messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The conversation with this system message and no other; with none if it is empty.

    Raises:
        InputError: nothing else is in it.
    """
    others = tuple(m for m in messages if m["role"] not in ("system", "developer"))
    if not others:
        raise InputError(f"{place}: holds a system message alone, which --system-prompt replaces")
    return ({"role": "system", "content": system}, *others) if system else others


def _prompt(place: str, row: dict[str, Any]) -> tuple[str, Any]:
    """(field, value) of what holds the prompt."""
    given = [n for n in ("prompt", "messages") if row.get(n) is not None]
    if len(given) == 2:
        raise InputError(
            f"{place}: has both 'prompt' and 'messages'; keep one, or name it with --prompt-column"
        )
    if given == ["prompt"]:
        if not isinstance(row["prompt"], (str, list)):
            raise InputError(
                f"{place}: field 'prompt' must be a text that is not empty, or a list of messages"
            )
        return "prompt", row["prompt"]
    if given:
        return "messages", row["messages"]
    if row.get("conversations") is not None:
        return "conversations", _from_sharegpt(place, row["conversations"])
    raise InputError(
        f"{place}: field 'prompt' is missing (or 'messages'); the row has "
        f"{', '.join(map(str, row)) or 'nothing'}; if one of these is the prompt, name it with "
        "--prompt-column"
    )


def _from_sharegpt(place: str, turns: Any) -> Any:
    """Messages of turns with `from` and `value`; anything else as it is."""
    if not isinstance(turns, list):
        return turns
    return [
        {"role": SHAREGPT.get(t["from"], t["from"]), "content": t["value"]}
        if isinstance(t, dict) and "from" in t and "value" in t
        else t
        for t in turns
    ]


def _messages(
    place: str, name: str, value: Any, may_be_empty: tuple[str, ...] = ("system",)
) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{place}: field '{name}' must be a list that is not empty")
    named = ((f"{place}: field '{name}[{i}]", m) for i, m in enumerate(value))
    return tuple(_message(where, m, may_be_empty) for where, m in named)


def _message(place: str, message: Any, may_be_empty: tuple[str, ...]) -> Message:
    """A message with its content as one text.

    Args:
        place: file, line and the beginning of the field's name.
        may_be_empty: roles that may say nothing. An empty system message is not the same as none:
            it replaces a template's own.
    """
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise InputError(f"{place}.role' must be one of {', '.join(ROLES)}")
    content = _text(place, message.get("content"))
    calls = message.get("tool_calls")
    if not content.strip() and role not in may_be_empty and not calls:
        raise InputError(f"{place}.content' must be a text that is not empty")
    kept = {k: v for k, v in message.items() if v is not None} | {"content": content}
    return kept | {"tool_calls": [_call(c) for c in calls]} if isinstance(calls, list) else kept


def _text(place: str, content: Any) -> str:
    """A text, or the texts of a list of parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise InputError(f"{place}.content' has a part of type '{kind}'; only text is read")
        content = "".join(
            str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content
        )
    if not isinstance(content, str):
        raise InputError(f"{place}.content' must be a text that is not empty")
    return content


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates expect, not as OpenAI's text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def pair_conversation(
    place: str, row: dict[str, Any]
) -> tuple[tuple[Message, ...], dict[str, str]]:
    """(prompt, the text of each answer by `chosen` and `rejected`) of a preference pair.

    Raises:
        InputError: a side is missing, or has another shape.
    """
    sides = {}
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise InputError(f"{place}: field '{side}' is missing; the row has {', '.join(row)}")
        sides[side] = _answer(place, side, row[side])
    if all(isinstance(s, str) for s in sides.values()):
        if not {"prompt", "messages", "conversations"} & row.keys():
            sides = {side: _transcript(place, side, text) for side, text in sides.items()}
        else:
            return row_messages(place, row), {s: str(text) for s, text in sides.items()}
    if not all(isinstance(s, tuple) for s in sides.values()):
        raise InputError(f"{place}: 'chosen' and 'rejected' must both be texts, or both messages")
    within = _shared(*sides.values())
    asked = within or row_messages(place, {k: v for k, v in row.items() if k != "messages"})
    return asked, {side: _last(place, side, m, len(within)) for side, m in sides.items()}


def _answer(place: str, side: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InputError(f"{place}: field '{side}' must be a text or a list of messages")
    return _messages(place, side, value, ("system", "assistant"))  # the caller counts empty ones


def _transcript(place: str, side: str, text: str) -> tuple[Message, ...]:
    """The messages of a dialogue written as one text, as Anthropic's HH data has it."""
    parts = TURN.split(text if text.startswith("\n") else f"\n\n{text}")
    if len(parts) < 5 or parts[0].strip() or parts[-2] != "Assistant":
        raise InputError(
            f"{place}: field 'prompt' is missing, and '{side}' is no dialogue that holds it (a list"
            " of messages, or a text of 'Human:' and 'Assistant:' turns)"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    )


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with which both sides begin, up to the last that asks."""
    count = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        count += 1
    while count and chosen[count - 1]["role"] == "assistant":
        count -= 1
    return chosen[:count]


def _last(place: str, side: str, messages: tuple[Message, ...], asked: int) -> str:
    rest = messages[asked:]
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        raise InputError(
            f"{place}: field '{side}' must hold one message of the assistant after what it shares "
            f"with the other side; it holds {', '.join(m['role'] for m in rest) or 'none'}"
        )
    return str(rest[0]["content"])
