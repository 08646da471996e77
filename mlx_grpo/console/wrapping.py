"""Long lines for a terminal: broken between words, but never inside a command that is to be copied
or a path."""

import re
import textwrap

COMMAND = re.compile(r"(?<=[:;] )(?:mlx-grpo|mlx_lm\.\w+|pip|hf) .+$")
"""What a message ends with when it tells people what to type."""
SINGLE_BLANK = re.compile(r"(?<=\S) (?=\S)")
COUNTED = re.compile(r"(?<=\d) (?=[A-Za-z])")
"""Between a number and its unit, or what it counts."""
NO_BREAK = "\N{NO-BREAK SPACE}"


def in_columns(text: str, width: int) -> str:
    """A line of columns, with two blanks between them, broken between columns only; what is left
    stands under the second one."""
    second = re.match(r" *\S+ +", text)
    kept = SINGLE_BLANK.sub(NO_BREAK, text)
    return wrapped(kept, width, second.end() if second else 0).replace(NO_BREAK, " ")


def wrapped(text: str, width: int, hanging: int = 0) -> str:
    """The line in pieces of up to `width` characters, all but the first behind `hanging` blanks. A
    number stays beside what it counts.

    A command that does not fit beside its text stands on a line of its own. Where a command or a
    path is longer than the line, the terminal folds it, so that it is copied as it is.
    """
    if len(text) <= width or width <= hanging:
        return text
    told = COMMAND.search(text)
    prose = text[: told.start()].rstrip() if told else text
    lines = textwrap.wrap(
        COUNTED.sub(NO_BREAK, prose),
        width,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = [line.replace(NO_BREAK, " ") for line in lines]
    return "\n".join([*lines, *([" " * hanging + told[0]] if told else [])])
