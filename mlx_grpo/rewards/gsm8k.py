"""A reward that checks: is the last number of an answer the one that GSM8K gives?

    mlx-grpo train --config gsm8k

The rows of the data set (openai/gsm8k) have a field `answer`, which ends with `#### 72`. Rows of
your own with such a field, or with the number alone in it, work as well.
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(completions: list[str], answer: str) -> list[float]:
    """1 for completions whose final number is that of `answer`, 0 for others.

    The final number is the first one after the last `####`, or the last one where there is no such
    mark. Thousands separators and trailing zeros make no difference.

    Raises:
        ValueError: `answer` holds no number.
    """
    expected = final_number(answer)
    if expected is None:
        raise ValueError(f"field 'answer' holds no number: {answer[-40:]!r}")
    return [float(final_number(text) == expected) for text in completions]


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends with; None where it holds none."""
    _, mark, after = text.rpartition("####")
    found = NUMBER.findall(after)
    if not found:
        return None
    return Decimal(found[0 if mark else -1].replace(",", ""))
