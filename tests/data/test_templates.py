"""Chat templates are programs from elsewhere: bounded in time and size, and they must say what was
said."""

from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data import chat
from mlx_grpo.data.chat import load_chat_tokenizer, prompt_tokens
from mlx_grpo.models.backbone import load_backbone
from tests.helpers.tiny import CHAT_TEMPLATE, write_model, write_tokenizer

ASK = ({"role": "user", "content": "tea?"},)
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "{{ messages[0]['content'] * 900000 }}"
LATER = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer(directory: Path, template: str) -> object:
    write_tokenizer(directory, chat_template=template)
    return load_chat_tokenizer(directory)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("", "no chat template|its chat template is empty"),
        (" \n", "its chat template is empty"),
        ("{# nothing #}", "its chat template is empty"),
        ("{{ '' }}", "its chat template is empty"),
        ("Hello!", "its chat template leaves out the text of a request"),
        ("{{ bos_token }}<user>", "its chat template leaves out the text of a request"),
        ("{{ messages | length }}", "its chat template leaves out the text of a request"),
        ("{{ messages[0]['role'] }}", "its chat template leaves out the text of a request"),
        ("{{ messages[0]['content'] }}", "its chat template leaves out the text of an answer"),
    ],
)
def test_a_template_that_passes_over_what_is_said_is_refused(
    tmp_path: Path, template: str, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        tokenizer(tmp_path, template)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LATER])
def test_a_template_that_says_it_is_taken(tmp_path: Path, template: str) -> None:
    assert len(prompt_tokens("p:1", tokenizer(tmp_path, template), ASK)) >= 4


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (LATER + "{% if messages[0]['content'] == 'tea?' %}" + FOREVER + "{% endif %}", r"0\.2 s"),
        (LATER + "{% if messages[0]['content'] == 'tea?' %}" + ENDLESS + "{% endif %}", "writes"),
    ],
)
def test_a_template_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, complaint: str
) -> None:
    monkeypatch.setattr(chat, "LONGEST_RENDERING", 0.2)
    loaded = tokenizer(tmp_path, template)
    with pytest.raises(InputError, match=rf"p:1: the chat template refuses.*{complaint}"):
        prompt_tokens("p:1", loaded, ASK)


def test_the_time_limit_holds_where_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "LONGEST_RENDERING", 0.02)
    slow = "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}"
    write_tokenizer(write_model(tmp_path / "sft"), chat_template=slow)
    with pytest.raises(InputError, match=r"sft: the chat template refuses .*not done within 0\.02"):
        load_backbone(tmp_path / "sft")


def test_a_template_s_message_steers_no_terminal(tmp_path: Path) -> None:
    template = (
        LATER
        + "{% if messages|length == 1 %}{{ raise_exception('\\x1b]52;c;aGk=\\x07no') }}{% endif %}"
    )
    with pytest.raises(InputError) as refusal:
        prompt_tokens("p:1", tokenizer(tmp_path, template), ASK)
    assert "\x1b" not in str(refusal.value) and "\\x1b]52;c;aGk=\\x07no" in str(refusal.value)
