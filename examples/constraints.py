"""A reward that can be checked: does an answer keep to the constraints that its prompt states?

    mlx-grpo train --rm-model none --reward examples/constraints.py:constraints \\
      --eval-reward examples/constraints.py:all_met ...

The rows of `constraints_train.jsonl` carry what the prompt says in words: `min_words`, `max_words`,
`keyword`. A reward function gets those fields and arguments that it names, and returns a number per
completion; it needs nothing of mlx_grpo.
"""

import re


def constraints(
    completions: list[str],
    finish_reasons: list[str],
    min_words: int,
    max_words: int,
    keyword: str,
) -> list[float]:
    """Mean of three marks in [0, 1] per completion: number of words, keyword, full stop.

    Graded, not all or nothing: a policy that never meets all three still learns from the answers
    that come nearer than their neighbours.
    """
    return [
        (_length(text, min_words, max_words) + _keyword(text, keyword) + _ending(text, reason)) / 3
        for text, reason in zip(completions, finish_reasons, strict=True)
    ]


def all_met(
    completions: list[str],
    finish_reasons: list[str],
    min_words: int,
    max_words: int,
    keyword: str,
) -> list[float]:
    """1 for completions that meet every constraint, 0 for others: a figure to watch."""
    marks = constraints(completions, finish_reasons, min_words, max_words, keyword)
    return [float(mark == 1.0) for mark in marks]


def _length(text: str, low: int, high: int) -> float:
    count = len(text.split())
    beyond = max(low - count, 0) / low + max(count - high, 0) / high
    return max(0.0, 1.0 - beyond)


def _keyword(text: str, keyword: str) -> float:
    return float(re.search(rf"\b{re.escape(keyword)}\b", text, re.IGNORECASE) is not None)


def _ending(text: str, finish_reason: str) -> float:
    """Half for ending before the limit, half for ending with a full stop."""
    return (finish_reason == "stop") / 2 + text.rstrip().endswith(".") / 2
