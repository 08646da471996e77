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
EXAMPLE = '<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def game(number: int) -> dict[str, Any]:
    """A prompt of the number game."""
    call = EXAMPLE.format(name="guess", arguments=f'{{"number": {(LOW + HIGH) // 2}}}')
    text = (
        f"Find my secret number between {LOW} and {HIGH}. Guess with a call, then use the hint for "
        f"the next guess. First guess: {call}"
    )
    return {"prompt": text, "secret": number, "low": LOW, "high": HIGH, "response": call}


def sum_of(number: int) -> dict[str, Any]:
    """A prompt of the calculator, by the number of the instance."""
    drawn = random.Random(number)
    a, b = drawn.randint(500, 4999), drawn.randint(500, 4999)
    call = EXAMPLE.format(name="add", arguments=f'{{"a": {a}, "b": {b}}}')
    text = f"What is {a} + {b}? Call the tool add, then say the result."
    return {"prompt": text, "answer": a + b, "response": call}


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
