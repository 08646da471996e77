"""A chat template can make much of little in one operation; it is refused before the memory is
taken, and templates as models have them write what they wrote."""

import json
import tracemalloc
from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import load_chat_tokenizer, prompt_text
from tests.helpers.tiny import write_tokenizer

ASK = ({"role": "user", "content": "tea?"},)
SAYS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LONG = "{% set x = 'x' * 9000000 %}"
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x WITH n.x %}"


def written(directory: Path, template: str) -> str:
    write_tokenizer(directory, chat_template=template)
    return prompt_text("p:1", load_chat_tokenizer(directory), ASK)


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{% set x = [0] * 10**9 %}",
        "{% set x = 10 ** (10 ** 9) %}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x'.ljust(width=10**9) }}",
        "{{ 'x'.zfill('1000000000' | int) }}",
        "{{ 'a\tb'.expandtabs(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%.1000000000f' | format(1.0) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ 'x' | indent(10**9, first=true) }}",
        "{{ [[1]] | tojson(indent=10**9) }}",
        LONG + "{{ x.replace('x', x) }}",
        LONG + "{{ x | replace('x', 'yy') }}",
        LONG + "{{ ([x] * 1000) | join }}",
        LONG + "{{ ([x] * 1000) | map('trim') | join('') }}",
        LONG + "{{ ''.join([x] * 1000) }}",
        LONG + "{{ x.join(['a', 'b', 'c']) }}",
        LONG + "{{ [x] * 1000 }}",
        LONG + "{{ ([x] * 1000) | tojson }}",
        LONG + "{{ ([x] * 1000) | string | length }}",
        LONG + "{{ 'a' ~ ([x] * 1000) }}",
        LONG + "{% for i in range(1000) %}{{ x }}{% endfor %}",
        LONG + "{% set y %}{% for i in range(1000) %}{{ x }}{% endfor %}{% endset %}",
        LONG + "{% macro m() %}{{ x }}{{ x }}{% endmacro %}{% set y = m() %}",
        DOUBLED.replace("WITH", "~") + "{% endfor %}",
        DOUBLED.replace("WITH", "+") + "{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_what_would_take_gigabytes_is_refused_in_one_line(tmp_path: Path, bomb: str) -> None:
    guarded = SAYS + "{% if messages[0]['content'] == 'tea?' %}" + bomb + "{% endif %}"
    complaint = r"p:1: the chat template refuses .*: it (makes|asks|uses) "
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=complaint):
            written(tmp_path, guarded)
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '-' * 3 }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 7 % 2 }}{{ 1 + 1 }}", "---[1, 1]102412"),
        ("{{ 'a' + 'b' ~ 1 ~ none ~ [2] }}", "ab1None[2]"),
        ("{{ '%s is %05.1f%%' % ('x', 2) }}", "x is 002.0%"),
        ("{{ '%s:%d' | format('x', 2) }}{{ '{:>3}|{}'.format(1, 'a') }}", "x:2  1|a"),
        ("{{ 'a\\nb' | indent(2) }}{{ 'aXa' | replace('X', '-') }}", "a\n  ba-a"),
        ("{{ 'a,b'.split(',') | map('upper') | join('+') }}{{ '-'.join(['a', 'b']) }}", "A+Ba-b"),
        ("{{ messages | tojson }}", json.dumps(ASK)),
        ("{{ 16384 | default(0) }}{{ 2000000000 | int }}", "163842000000000"),
        ("{% set n = namespace(x='') %}{% set n.x = n.x ~ 'a' %}{{ n.x }}{{ nothing }}", "a"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m('b') | trim }}", "<b>"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% generation %}{{ dict(a=1)['a'] }}{% endgeneration %}", "1"),
    ],
)
def test_what_templates_do_is_done_as_before(tmp_path: Path, template: str, expected: str) -> None:
    assert written(tmp_path, template + SAYS) == expected + "tea?"
