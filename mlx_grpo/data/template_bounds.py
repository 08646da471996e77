"""How long a text may become while a chat template is at work, checked before it is made.

A time limit does not end `'x' * 10**10`: that is one operation, and the memory is gone before it
returns. So operators, methods and filters that can make much of little are asked first.
transformers compiles templates in jinja's sandbox; inside `bounded` it gets a stricter one.
"""

import re
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 10_000_000
"""Characters of a text, items of a list, bits of a number: more than any model reads."""
WIDTH = re.compile(r"[%:.][^\w%{}]*(\*|\d{6,}|\{)")
"""A width in a format that is very large, or is taken from the arguments."""
REFUSED = ("expandtabs", "translate", "wordwrap")
"""They can make much of little, and no chat template needs them."""


@contextmanager
def bounded() -> Iterator[None]:
    """transformers compiles templates with these bounds while the block runs."""
    from transformers.utils import chat_template_utils as place

    usual = place.ImmutableSandboxedEnvironment
    place.ImmutableSandboxedEnvironment = Bounded
    try:
        yield
    finally:
        place.ImmutableSandboxedEnvironment = usual


class _Code(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(environment.written, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Filters(UserDict[str, Callable[..., Any]]):
    """Filters, each of which looks at its arguments first."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function = super().__getitem__(name)
        first = int(hasattr(function, "jinja_pass_arg"))  # before it stands what jinja passes

        @wraps(function)  # with that mark
        def careful(*args: Any, **named: Any) -> Any:
            args = _listed(name, args)
            _check_call(name, args[first], (*args[first + 1 :], *named.values()))
            return function(*args, **named)

        return careful


class Bounded(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which no operation makes something of more than LONGEST."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Code

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named, finalize=_checked)
        self.filters = _Filters(self.filters)  # type: ignore[assignment]

    @staticmethod
    def written(value: Any) -> str:
        """A value as text."""
        return str(_checked(value))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Pieces that follow one another: what a template or a block writes, and `a ~ b`."""
        found, length = [], 0
        for piece in pieces:
            found.append(piece)
            length += len(piece)
            _check(length)
        return "".join(found)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do it unless it makes too much."""
        if operator == "%" and isinstance(left, str):
            _check_call("format", left, (right,))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * right)
        elif operator == "*" and isinstance(left, Sized) and isinstance(right, int):
            _check(len(left) * right)
        elif operator == "*" and isinstance(right, Sized) and isinstance(left, int):
            _check(len(right) * left)
        elif operator != "%":
            _check(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **named: Any) -> Any:
        """Do it unless it makes too much."""
        method = getattr(function, "__wrapped__", function)  # of jinja's own `format`
        name = getattr(method, "__name__", "")
        args = _listed(name, args)
        _check_call(name, getattr(method, "__self__", None), (*args, *named.values()))
        return super().call(context, function, *args, **named)


def _listed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of which those that `join` would use up can be looked at before."""
    return tuple(list(a) if name == "join" and isinstance(a, Iterator) else a for a in args)


def _check_call(name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """A method of a value, a filter of it, or a function."""
    if name in REFUSED:
        raise SecurityError(f"it uses {name}")
    total = _written((value, *arguments))
    for argument in arguments:
        _check(argument if isinstance(argument, int) else 0)
    if name == "join":
        items = [a for a in (value, *arguments) if isinstance(a, Sized) and not isinstance(a, str)]
        _check(total + sum(map(len, items)) * max(map(_size, (value, *arguments))))
    elif isinstance(value, str):
        _check_text(name, value, arguments)


def _check_text(name: str, text: str, arguments: tuple[Any, ...]) -> None:
    if name.startswith("format") and (found := WIDTH.search(text)):
        raise SecurityError(f"it asks for a width of {found[1]} in {text[:40]!r}")
    if name == "replace" and len(arguments) > 1:
        old, new = map(str, arguments[:2])
        _check(len(text) + text.count(old) * len(new))
    if name == "indent" and arguments:
        width = arguments[0] if isinstance(arguments[0], int) else len(arguments[0])
        _check(len(text) + (len(text.splitlines()) + 1) * width)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, Sized) else 0


def _checked(value: Any) -> Any:
    _written(value)
    return value


def _written(value: Any) -> int:
    """About as many characters as the value has as a text; a list may hold another many times."""
    length, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        length += 1 + _size(one)
        _check(length)
        if isinstance(one, Mapping):
            waiting.extend([*one, *one.values()])
        elif isinstance(one, list | tuple):
            waiting.extend(one)
    return length


def _check(size: int) -> None:
    if size > LONGEST:
        raise SecurityError(f"it makes something of more than {LONGEST:,} characters")
