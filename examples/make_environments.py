"""Write the prompts of the number game and the calculator: python examples/make_environments.py

Held-out prompts are instances that no training prompt has.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TRAIN, HELD_OUT = 240, 60
LOW, HIGH = 1, 300
CALL = '<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
RESPONSE = "<tool_response>\n{text}\n</tool_response>"


def call(name: str, **arguments: int) -> str:
    """A tool call as a model writes it."""
    return CALL.format(name=name, arguments=json.dumps(arguments))


def talk(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn: a model of this size needs to be shown."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def game(number: int) -> dict[str, Any]:
    """A prompt of the number game, with a game that was played before and a first guess."""
    ask = f"Find my secret number from {LOW} to {HIGH}."
    shown = []
    for guess, hint in ((150, "higher"), (225, "lower"), (187, "higher")):
        shown += [call("guess", number=guess), RESPONSE.format(text=f"the secret is {hint}")]
    shown += [call("guess", number=206), RESPONSE.format(text="correct, the game is over")]
    first = 149 if number == 150 else 150
    hint = RESPONSE.format(text=f"the secret is {'higher' if number > first else 'lower'}")
    messages = talk(ask, *shown, "Found it.", ask, call("guess", number=first), hint)
    row = {"secret": number, "low": LOW, "high": HIGH}
    return {"messages": messages, **row, "response": call("guess", number=number)}


def sum_of(number: int) -> dict[str, Any]:
    """A prompt of the calculator, by the number of the instance, with a sum that was done."""
    drawn = random.Random(number)
    a, b = drawn.randint(500, 4999), drawn.randint(500, 4999)
    said = []
    for x, y in ((731, 1846), (4088, 2514), (1250, 963)):
        result = RESPONSE.format(text=x + y)
        said += [f"What is {x} + {y}?", call("add", a=x, b=y), result, f"It is {x + y}."]
    messages = talk(*said, f"What is {a} + {b}?")
    return {"messages": messages, "answer": a + b, "response": call("add", a=a, b=b)}


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    order = random.Random(7).sample(range(LOW, HIGH + 1), TRAIN + HELD_OUT)
    for name, made in (("number_game", game), ("calculator", sum_of)):
        for part, numbers in (("train", order[:TRAIN]), ("eval", order[TRAIN:])):
            rows = [{"id": f"{name} {n}", **made(n)} for n in numbers]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{name}_{part}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
