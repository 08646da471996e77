"""The one exception that means "the input is wrong", as opposed to "the program is wrong"; and
texts from elsewhere that are safe to show."""

import re

STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 (escape, bell, backspace), delete, C1 (one-character escapes)
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of writing
    "\u2028\u2029\ud800-\udfff]"  # line breaks, and surrogates, which no file can hold
)
"""Characters that a terminal obeys instead of showing them."""


def visible(text: str, keep: str = "") -> str:
    """`text` with the characters that steer a terminal as Python writes them, `\\x1b` for escape.

    Args:
        keep: of these characters those that stay as they are.
    """
    return STEERING.sub(lambda m: m[0] if m[0] in keep else _spelled(m[0]), text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def single_line(text: str) -> str:
    """`visible` on one line: what is written over several lines is joined by blanks."""
    return visible(re.sub(r"\s*\r?\n\s*", " ", text.strip()))


class InputError(ValueError):
    """Bad input: one line with file, place, field and remedy; the command line exits with 2."""

    def __init__(self, text: str):
        super().__init__(single_line(text))


def one_line(error: object) -> str:
    """The beginning of another library's complaint, without line breaks."""
    return " ".join(visible(str(error), keep="\n\r\t").split())[:300]
