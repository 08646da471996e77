"""An environment: a calculator for sums that a small model cannot do in its head.

    mlx-grpo train --config examples/calculator.toml

See docs/environments.md.
"""

import re
from types import SimpleNamespace
from typing import Any


class Calculator:
    """A tool that adds, and counts how often it did."""

    def __init__(self) -> None:
        self.sums = 0

    def reset(self, answer: int) -> None:
        self._answer = answer
        self.helped = False

    def add(self, a: int, b: int) -> str:
        """
        Add two numbers.

        Args:
            a: the first number
            b: the second number
        """
        self.sums += 1
        total = int(a) + int(b)
        self.helped = self.helped or total == self._answer
        return str(total)

    def reward(self) -> float:
        """A little for a call at all, more for the one that gives the answer: a policy that does
        not know the tool must find it first."""
        return 0.5 if self.helped else 0.2 if self.sums else 0.0


def right(turns: list[list[dict[str, Any]]], answer: int) -> list[float]:
    """1 where the last turn names the answer, and no other number of its size."""
    return [float(_numbers(messages[-1]["content"]) == {answer}) for messages in turns]


def used(environments: list[SimpleNamespace]) -> list[float]:
    """1 where the calculator was called: a figure to watch."""
    return [float(e.sums > 0) for e in environments]


def _numbers(text: str) -> set[int]:
    """Numbers of at least four digits: the addends have three or four, the answers four."""
    found = re.findall(r"\d[\d,]*", text.rpartition("=")[2])
    return {int(n.replace(",", "")) for n in found if len(n.replace(",", "")) >= 4}
