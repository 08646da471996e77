"""Tools in a conversation: how the model is told of them, how it calls one, how it is answered.

A tokenizer whose chat template knows tools is used as it is, with mlx-lm's parser of its family.
For others the system message says in plain words which tools there are, a call is JSON between
`<tool_call>` and `</tool_call>`, and the answer is a message of the user in `<tool_response>`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tool_parsers import json_tools

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import Observation
from mlx_grpo.data.chat import ANSWER, TURN, TemplateRefusal, rendered
from mlx_grpo.data.messages import Message

PLAIN = """You can call these tools:
{tools}
To call one, write a line such as
<tool_call>{{"name": "{name}", "arguments": {{{arguments}}}}}</tool_call>
and end your turn. The result comes as <tool_response>. Answer without a call when you are done."""


@dataclass(frozen=True)
class Tools:
    """The tools of an environment, and what this tokenizer makes of them."""

    schemas: tuple[dict[str, Any], ...]
    native: bool
    """Whether the chat template knows tools."""
    start: str
    """Opens a call."""
    end: str
    """Closes it; empty where only the end of the turn does."""
    parser: Any
    """mlx-lm's `parse_tool_call` of the family."""


@dataclass(frozen=True)
class Call:
    """A tool call that is well formed."""

    name: str
    arguments: dict[str, Any]


def tools_for(tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> Tools:
    """How a model with this tokenizer uses the tools."""
    parser = getattr(tokenizer, "tool_parser", None)
    if schemas and parser and _told_by_template(tokenizer, schemas):
        start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
        return Tools(tuple(schemas), True, start, end or "", parser)
    json_form = (json_tools.tool_call_start, json_tools.tool_call_end, json_tools.parse_tool_call)
    return Tools(tuple(schemas), False, *json_form)


def _told_by_template(tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> bool:
    try:
        text = rendered(tokenizer, TURN[:1], True, tools=schemas)
    except TemplateRefusal:
        return False
    return all(schema["function"]["name"] in text for schema in schemas)


def told_of(tools: Tools, messages: Sequence[Message]) -> list[Message]:
    """The conversation with a system message that describes the tools, where the chat template does
    not do it."""
    if tools.native or not tools.schemas:
        return list(messages)
    first = tools.schemas[0]["function"]
    names = first["parameters"].get("properties", {})
    about = PLAIN.format(
        tools="\n".join(json.dumps(s["function"], ensure_ascii=False) for s in tools.schemas),
        name=first["name"],
        arguments=", ".join(f'"{n}": ...' for n in names),
    )
    own = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if own else messages
    return [{"role": "system", "content": f"{own}\n\n{about}".strip()}, *rest]


def calls_in(tools: Tools, text: str) -> list[Call | Observation]:
    """The tool calls of a turn, in order; a malformed one is the observation that says so."""
    found: list[Call | Observation] = []
    _, *pieces = text.split(tools.start) if tools.schemas else [text]
    for piece in pieces:
        inside, closed, _ = piece.partition(tools.end) if tools.end else (piece, "end", "")
        if not closed:
            found.append(_malformed(f"it does not end with {tools.end}"))
            continue
        try:
            parsed = tools.parser(inside, list(tools.schemas))
        except Exception as e:  # parsers of many families, on whatever a model writes
            found.append(_malformed(one_line(e)))
            continue
        found += [_call(p) for p in (parsed if isinstance(parsed, list) else [parsed])]
    return found


def _call(parsed: Any) -> Call | Observation:
    if not isinstance(parsed, Mapping) or not isinstance(parsed.get("name"), str):
        return _malformed("it has no name")
    arguments = parsed.get("arguments", {})
    if not isinstance(arguments, dict) or not all(isinstance(k, str) for k in arguments):
        return _malformed("its arguments are no object")
    return Call(parsed["name"], arguments)


def _malformed(reason: str) -> Observation:
    return Observation(f"the call is malformed: {reason}"[:300], failed=True)


def answered(tools: Tools, observations: Sequence[Observation]) -> list[Message]:
    """The messages that hold what the tools answered."""
    texts = [f"error: {o.text}" if o.failed else o.text for o in observations]
    if tools.native:
        return [{"role": "tool", "content": text} for text in texts]
    parts = [f"<tool_response>\n{text}\n</tool_response>" for text in texts]
    return [{"role": "user", "content": "\n".join(parts)}]


def observation_tokens(
    tokenizer: Any,
    tools: Tools,
    history: Sequence[Message],
    answers: Sequence[Message],
    closing: str,
) -> tuple[int, ...]:
    """What the chat template writes between a turn that called tools and the next one.

    Args:
        history: the conversation before that turn.
        closing: text of the stop token that ended it.

    Raises:
        InputError: the template rewrites the conversation before the answers, or leaves them out,
            so what the model sees could not be what the template would write.
    """
    turn = {"role": "assistant", "content": ANSWER}
    schemas = tools.schemas if tools.native else ()
    try:
        so_far = rendered(tokenizer, [*history, turn], tools=schemas)
        whole = rendered(tokenizer, [*history, turn, *answers], True, tools=schemas)
    except TemplateRefusal as e:
        raise InputError(f"the chat template refuses a tool's answer: {e}") from None
    before, _, after = so_far.rpartition(ANSWER)
    kept = whole.startswith(before + ANSWER)
    rest = whole[len(before + ANSWER) :]
    if not kept or not rest.startswith(_common(closing, after)):
        raise InputError(
            "the chat template rewrites earlier turns once a tool has answered, so a conversation "
            "cannot go on where it stopped; use a template that only appends"
        )
    added = rest[len(_common(closing, after)) :]
    if any(m["content"].strip() and m["content"].strip() not in added for m in answers):
        raise InputError(
            f"the chat template changes or leaves out messages of role '{answers[0]['role']}'"
        )
    return tuple(tokenizer.encode(added, add_special_tokens=False))


def _common(closing: str, after: str) -> str:
    """The text that closes a turn: it is in the conversation already, as the stop token. One that
    the template would not have written stands in its place."""
    if after.startswith(closing):
        return closing
    return after.rstrip()
