"""What closes an answer, by the chat template; what a template may do to a conversation."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import (
    answer_tokens,
    closing_token,
    end_of_turn,
    load_chat_tokenizer,
    prompt_tokens,
    stop_at_end_of_turn,
)
from mlx_grpo.models.backbone import load_backbone
from tests.helpers.tiny import CHAT_TEMPLATE, EOS, write_model, write_tokenizer

USER = {"role": "user", "content": "why"}
OPENING = "{% if add_generation_prompt %}A:{% endif %}"


def each(turn: str, end: str = OPENING) -> str:
    """A template that writes every message alike."""
    return "{% for m in messages %}" + turn + "{% endfor %}" + end


STYLES = {
    "ChatML": (each("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"), "<|im_end|>"),
    "Llama 3": (
        each("<|start|>{{ m.role }}<|head|>\n\n{{ m.content | trim }}<|eot|>"),
        "<|eot|>",
    ),
    "Gemma": (each("<turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"), "<end_of_turn>"),
    "Phi": (  # the end of the conversation is closed once more
        each(
            "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n",
            "{% if add_generation_prompt %}<|assistant|>{% else %}</s>{% endif %}",
        ),
        "<|end|>",
    ),
    "Mistral": (
        each(
            "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
            "{% else %} {{ m.content }}</s>{% endif %}"
        ),
        "</s>",
    ),
    "Cohere": (  # two tokens close a turn
        each("<|start|>{{ m.role }}<|text|>{{ m.content }}<|end_text|><|end|>"),
        "<|end|>",
    ),
    "Harmony": (  # the last turn is closed by another token than those before
        each(
            "<|start|>{{ m.role }}{{ m.content }}"
            "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}"
        ),
        "<|return|>",
    ),
    "closed only where a turn follows": (
        each("<|start|>{{ m.role }}{{ m.content }}{% if not loop.last %}<|end|>{% endif %}"),
        "<|end|>",
    ),
    "thoughts before the answer": (
        each("<|start|>{% if m.role == 'assistant' %}<|text|>\n<|end_text|>{% endif %}"
             "{{ m.content }}<|end|>\n"),
        "<|end|>",
    ),
    "plain text": (each("{{ m.role }}: {{ m.content }}\n\n"), None),
    "text that is no token": (each("{{ m.role }}: {{ m.content }}<|fin|>\n"), None),
    "nothing but the next opening": (each("<|start|>{{ m.role }}{{ m.content }}"), None),
    "a new beginning": (each("{% if m.role == 'user' %}<s>{% endif %}{{ m.content }}|"), None),
    "one turn only": (
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
        + each("{{ m.content }}<|end|>\n"),
        "<|end|>",
    ),
}  # fmt: skip
SAID = ("text that is no token", "a new beginning")
TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>", "<turn>", "<end_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]", "<|text|>", "<|end_text|>"),
    "<|return|>",
)


def tokenizer_of(directory: Path, template: str) -> Any:
    write_tokenizer(directory, template, TOKENS)
    return load_chat_tokenizer(directory)


@pytest.mark.parametrize("style", STYLES)
def test_the_token_that_closes_an_answer_is_read_from_the_template(
    style: str, tmp_path: Path
) -> None:
    template, closing = STYLES[style]
    tokenizer = tokenizer_of(tmp_path, template)
    found = closing_token(tokenizer)
    assert (tokenizer.convert_ids_to_tokens(found) if found is not None else None) == closing
    said = stop_at_end_of_turn(tokenizer)
    if closing in (None, "</s>"):
        assert tokenizer.eos_token_ids == {EOS}
        assert (said is not None) == (style in SAID)
        assert answer_tokens(tokenizer, "ab")[-1] == EOS
    else:
        assert said and closing in said and "</s>" in said
        assert tokenizer.eos_token_ids == {EOS, found}
        assert answer_tokens(tokenizer, "ab") == (*answer_tokens(tokenizer, "ab", "length"), found)
        assert stop_at_end_of_turn(tokenizer) is None  # it is one now


def test_the_opening_of_the_next_turn_ends_an_answer_where_the_configuration_says_so(
    tmp_path: Path,
) -> None:
    write_tokenizer(tmp_path, STYLES["nothing but the next opening"][0], ("<|start|>",))
    assert end_of_turn(load_chat_tokenizer(tmp_path)) == EOS
    tokenizer = load_chat_tokenizer(tmp_path, [EOS, EOS + 2])
    assert end_of_turn(tokenizer) == EOS + 2


def test_a_backbone_stops_at_a_closing_token_that_its_configuration_forgot(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    assert load_backbone(path).note is None
    write_tokenizer(path, STYLES["Gemma"][0], ("<turn>", "<end_of_turn>"))
    backbone = load_backbone(path)
    assert backbone.stop_ids == {EOS, EOS + 3}
    assert backbone.note and backbone.note.startswith(f"{path}: ") and "\n" not in backbone.note


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    template = each("{% if m.role != 'developer' %}{{ m.content }}{% endif %}")
    tokenizer = tokenizer_of(tmp_path, template)
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    with pytest.raises(InputError, match=r"f:1: the chat template leaves out .* role 'developer'"):
        prompt_tokens("f:1", tokenizer, messages)
    assert prompt_tokens("f:1", tokenizer, [USER])


def test_a_message_that_is_quoted_trimmed_or_empty_is_not_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, each("{{ m.content | trim | tojson }}"))
    tool = {"role": "tool", "content": ' {"weather": "rain\n"} '}
    system = {"role": "system", "content": ""}
    assert prompt_tokens("f:1", tokenizer, [system, USER, tool])


def test_thoughts_of_earlier_turns_may_be_left_out(tmp_path: Path) -> None:
    template = each("{{ m.content.split('</think>') | last }}")
    thought = {"role": "assistant", "content": "<think>circumstantial</think> because"}
    assert prompt_tokens("f:1", tokenizer_of(tmp_path, template), [USER, thought, USER])


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, STYLES["plain text"][0])
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="nothing ends an answer"):
        end_of_turn(tokenizer)


def test_a_date_in_a_template_is_the_one_that_is_given(tmp_path: Path) -> None:
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}|"
    write_tokenizer(tmp_path, clock + CHAT_TEMPLATE)
    tokenizer = load_chat_tokenizer(tmp_path, date="2024-02-29")
    shown = tokenizer.decode(list(prompt_tokens("f:1", tokenizer, [USER])))
    assert shown == "29 Feb 2024|<user>why</s><assistant>"
