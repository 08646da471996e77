"""A template of the user's, and arguments for it: seen by everything, within the same bounds."""

import json
from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import end_of_turn, prompt_text, read_chat_tokenizer
from mlx_grpo.data.template import Template
from mlx_grpo.models.backbone import load_backbone
from tests.helpers.tiny import EOS, write_model, write_tokenizer

ASK = [{"role": "user", "content": "why"}]
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% macro opening() %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endmacro %}"
    "{% if add_generation_prompt %}{{ opening() }}{{ mood }}{% endif %}"
)


def shown(directory: Path, template: Template = Template()) -> str:  # noqa: B008 (frozen)
    return prompt_text("p:1", read_chat_tokenizer(directory, template=template), ASK)


@pytest.fixture
def thinker(tmp_path: Path) -> Path:
    """A tokenizer whose template can think."""
    write_tokenizer(tmp_path, THINKING)
    return tmp_path


def test_thinking_is_off_unless_asked_for(thinker: Path) -> None:
    assert shown(thinker) == "<user>why</s><assistant>"
    asked = shown(thinker, Template(kwargs='{"enable_thinking": true}'))
    assert asked == "<user>why</s><assistant><think>"


def test_an_argument_reaches_the_template_as_it_was_written(thinker: Path) -> None:
    mood = "a \"b\" 'c' {% d %} \\n é \U0001f600"
    found = shown(thinker, Template(kwargs=f'{{"mood": {json.dumps(mood)}}}'))
    assert found == f"<user>why</s><assistant>{mood}"


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ('{"enable_thinkin": true}', "does not read 'enable_thinkin'"),
        ('{"messages": []}', "'messages' is no argument"),
        ('{"a b": 1}', "'a b' is no argument"),
    ],
)
def test_an_argument_that_would_change_nothing_is_refused(
    thinker: Path, kwargs: str, reason: str
) -> None:
    with pytest.raises(InputError, match=f"--chat-template-kwargs: .*{reason}"):
        shown(thinker, Template(kwargs=kwargs))


@pytest.mark.parametrize("own", [None, "{{ 'nothing of it is seen' }}"])
def test_a_file_takes_the_place_of_the_models_own_template(tmp_path: Path, own: str | None) -> None:
    write_tokenizer(tmp_path, own)
    (tmp_path / "mine.jinja").write_text(THINKING)
    template = Template(file=str(tmp_path / "mine.jinja"), kwargs='{"enable_thinking": true}')
    assert shown(tmp_path, template) == "<user>why</s><assistant><think>"
    assert end_of_turn(read_chat_tokenizer(tmp_path, template=template)) == EOS


def test_a_template_from_a_file_is_held_to_the_same_bounds(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "bomb.jinja").write_text("{{ 'x' * 10 ** 10 }}")
    with pytest.raises(InputError, match=r"refuses .* more than 10,000,000"):
        shown(tmp_path, Template(file=str(tmp_path / "bomb.jinja")))


def test_a_file_that_leaves_out_what_is_said_is_refused_by_its_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "deaf.jinja").write_text("hello")
    template = Template(file=str(tmp_path / "deaf.jinja"))
    with pytest.raises(InputError, match=r"deaf\.jinja: its chat template leaves out"):
        load_backbone(model, template=template)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    for name, reason in (("absent.jinja", "no such file"), ("bytes.jinja", "not a text in UTF-8")):
        with pytest.raises(InputError, match=f"--chat-template .*{name}: {reason}"):
            shown(tmp_path, Template(file=str(tmp_path / name)))
