"""A template that reads the clock reads a pinned one, and is the same template otherwise."""

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from mlx_grpo.core.dates import is_date
from mlx_grpo.data.clock import pinned

DATE = "2026-01-05"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "05 Jan 2026"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-01-05"),
        ("{{ strftime_now('%-d %B %y, %A') }}", "5 January 26, Monday"),
        ("{{ strftime_now('%H:%M:%S') }}", "00:00:00"),
        ("{{ strftime_now('100%%') }}", "100%"),
        ("{% set f = '%B %Y' %}{{ strftime_now(f) }}", "January 2026"),
        ("{%- macro m() %}{{ strftime_now('%j') }}{% endmacro %}{{ m() }}", "005"),
        (
            "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
            "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
            "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ date_string }}",
            "05 Jan 2026",
        ),
    ],
)
def test_whatever_format_a_template_asks_for_is_that_of_the_pinned_date(
    template: str, shown: str
) -> None:
    assert _compile_jinja_template(pinned(template, DATE)).render() == shown


@pytest.mark.parametrize("head", ["", "  {% if true %}", "\n\n x", "{%- if true %} y", "{{ 1 }}\n"])
def test_what_stands_around_a_date_keeps_its_spaces_and_lines(head: str) -> None:
    tail = "{% endif %}\n z" if "if" in head else "\n z"
    plain = f"{head}05 Jan 2026{tail}"
    clock = f"{head}{{{{ strftime_now('%d %b %Y') }}}}{tail}"
    assert (
        _compile_jinja_template(pinned(clock, DATE)).render()
        == _compile_jinja_template(plain).render()
    )


def test_other_templates_and_templates_by_name_are_kept() -> None:
    assert pinned("{{ messages }}", DATE) == "{{ messages }}"
    assert pinned(None, DATE) is None
    both = pinned({"default": "a", "dated": "{{ strftime_now('%Y') }}"}, DATE)
    assert both["default"] == "a"
    assert _compile_jinja_template(both["dated"]).render() == "2026"


@pytest.mark.parametrize(
    ("text", "valid"),
    [(DATE, True), ("2026-02-30", False), ("20260105", False), ("05.01.2026", False), ("", False)],
)
def test_a_date_is_year_month_and_day(text: str, valid: bool) -> None:
    assert is_date(text) == valid
