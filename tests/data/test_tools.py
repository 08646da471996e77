"""Tools in a conversation: calls are read, answers follow as the chat template writes them."""

from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Observation
from mlx_grpo.data.chat import load_chat_tokenizer, rendered
from mlx_grpo.data.tools import (
    Call,
    answered,
    calls_in,
    observation_tokens,
    told_of,
    tools_for,
)
from tests.helpers.tiny import CHAT_TEMPLATE, write_model, write_tokenizer

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
    },
}
GOOD = '<tool_call>{"name": "add", "arguments": {"n": 1}}</tool_call>'
KNOWS_TOOLS = (
    "{% for t in tools or [] %}{{ '<tools>' + t['function']['name'] + '</tools>' }}{% endfor %}"
    "{# <tool_call> tool_call.name #}" + CHAT_TEMPLATE
)
USER = ({"role": "user", "content": "two words"},)


def tokenizer_with(directory: Path, template: str):  # type: ignore[no-untyped-def]
    write_model(directory)
    write_tokenizer(directory, template)
    return load_chat_tokenizer(directory)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>{", "does not end"),
        ("<tool_call>{</tool_call>", "malformed"),
        ("<tool_call>3</tool_call>", "no name"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "no object"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    tools = tools_for(tokenizer_with(tmp_path, CHAT_TEMPLATE), [ADD])
    first, wrong = calls_in(tools, f"so {GOOD} and {text}")
    assert first == Call("add", {"n": 1})
    assert isinstance(wrong, Observation) and wrong.failed and said in wrong.text
    assert calls_in(tools, "no call") == []


@pytest.mark.parametrize(("template", "native"), [(CHAT_TEMPLATE, False), (KNOWS_TOOLS, True)])
def test_the_conversation_goes_on_as_the_template_would_write_it(
    tmp_path: Path, template: str, native: bool
) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    tools = tools_for(tokenizer, [ADD])
    assert tools.native == native
    history = told_of(tools, USER)
    assert ("<tool_call>" in history[0]["content"]) != native
    messages = answered(tools, [Observation("7"), Observation("no", True)])
    ids = observation_tokens(tokenizer, tools, history, messages, "</s>")
    schemas = tools.schemas if native else ()
    before = rendered(tokenizer, history, True, tools=schemas) + GOOD + "</s>"
    turn = {"role": "assistant", "content": GOOD}
    whole = rendered(tokenizer, [*history, turn, *messages], True, tools=schemas)
    assert before + tokenizer.decode(list(ids)) == whole
    assert "error: no" in whole


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT_TEMPLATE.replace("m['role'] + '>'", "messages|length|string + '>'"), "rewrites"),
        (CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[:3] %}"), "leaves"),
    ],
)
def test_a_template_that_does_not_only_append_is_refused(
    tmp_path: Path, template: str, said: str
) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    tools = tools_for(tokenizer, [ADD])
    history = told_of(tools, USER)
    with pytest.raises(InputError, match=said):
        observation_tokens(tokenizer, tools, history, answered(tools, [Observation("7")]), "</s>")
