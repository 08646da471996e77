"""Write the prompts of the number game and the calculator: python examples/make_environments.py

Held-out prompts are instances that no training prompt has: sums of other numbers, and secrets
from other ranges. Those of `eval` choose a run's best adapter, those of `test` judge it.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = {"train": 240, "eval": 24, "test": 96}
WIDTH = 6
"""Numbers among which the secret is."""
CALL = '<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
RESPONSE = "<tool_response>\n{text}\n</tool_response>"


def call(name: str, **arguments: int) -> str:
    """A tool call as a model writes it."""
    return CALL.format(name=name, arguments=json.dumps(arguments))


def talk(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn: a model of this size needs to be shown."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def asked(low: int) -> str:
    """The question of a game."""
    return f"Find my secret number from {low} to {low + WIDTH - 1}."


def game(low: int, secret: int) -> dict[str, Any]:
    """A prompt of the number game, behind two games that were played before."""
    said = []
    for first, hint, second in ((43, "lower", 42), (27, "higher", 28)):
        said += [asked(first // 5 * 5), call("guess", number=first)]
        said += [RESPONSE.format(text=f"the secret is {hint}"), call("guess", number=second)]
        said += [RESPONSE.format(text="correct, the game is over"), "Found it."]
    row = {"secret": secret, "low": low, "high": low + WIDTH - 1}
    messages = talk(*said, asked(low))
    return {"messages": messages, **row, "response": call("guess", number=secret)}


def sum_of(a: int, b: int) -> dict[str, Any]:
    """A prompt of the calculator, behind two sums that were done before."""
    said = []
    for x, y in ((4088, 2514), (731, 1846)):
        result = RESPONSE.format(text=x + y)
        said += [f"What is {x} + {y}?", call("add", a=x, b=y), result, f"It is {x + y}."]
    messages = talk(*said, f"What is {a} + {b}?")
    return {"messages": messages, "answer": a + b, "response": call("add", a=a, b=b)}


def games(drawn: random.Random) -> list[dict[str, Any]]:
    """As many as all parts have; all secrets of a range follow one another."""
    ranges = sum(PARTS.values()) // WIDTH
    lows = drawn.sample([low for low in range(10, 95) if low not in (25, 40)], ranges)
    return [game(low, secret) for low in lows for secret in range(low, low + WIDTH)]


def sums(drawn: random.Random) -> list[dict[str, Any]]:
    """As many as all parts have."""
    numbers = drawn.sample(range(500, 5000), 2 * sum(PARTS.values()))
    return [sum_of(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]


def write(out: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows, part by part."""
    numbered = iter(enumerate(rows, start=1))
    for part, count in PARTS.items():
        taken = [next(numbered) for _ in range(count)]
        lines = "".join(json.dumps({"id": f"{name} {n}", **row}) + "\n" for n, row in taken)
        (out / f"{name}_{part}.jsonl").write_text(lines)


def main() -> None:
    """Write the six files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    write(out, "number_game", games(random.Random(7)))
    write(out, "calculator", sums(random.Random(7)))


if __name__ == "__main__":
    main()
