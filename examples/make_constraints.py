"""Make the prompts of `constraints.py` from those of the demo.

usage: python examples/make_constraints.py [--out examples]

`constraints_train.jsonl`: prompts of `data/rl_prompts.jsonl`, each with a limit on the number of
words and a word to use, the prompt's own longest one. `constraints_eval.jsonl`: prompts of
`data/eval_prompts.jsonl`, whose reference answer has a sentence that shows how it is done; the
limit is the lowest that lets it pass. The two files of `data/` do not overlap.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_grpo.data.tables import read_rows
from mlx_grpo.files.atomic import write_text
from mlx_grpo.rubric import FUNCTION_WORDS, words

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
MIN_WORDS, LIMITS, TRAINING_ROWS = 5, (12, 16, 20, 25), 240

Row = dict[str, Any]


def content_words(text: str) -> list[str]:
    """Words that carry meaning, the longest first."""
    found = {w for w in words(text) if w.isalpha() and len(w) > 3 and w not in FUNCTION_WORDS}
    return sorted(found, key=lambda w: (-len(w), w))


def constrained(row: Row, max_words: int, keyword: str) -> Row:
    """A row whose prompt says what its fields demand."""
    text = (
        f"{row['prompt']} Answer in {MIN_WORDS} to {max_words} words, use the word "
        f'"{keyword}", and end with a full stop.'
    )
    limits = {"min_words": MIN_WORDS, "max_words": max_words, "keyword": keyword}
    return {"id": row["id"], "prompt": text, **limits}


def training_rows(rows: Iterable[Row]) -> list[Row]:
    """The limits take turns."""
    usable = [(row, found[0]) for row in rows if (found := content_words(row["prompt"]))]
    return [
        constrained(row, LIMITS[i % len(LIMITS)], keyword)
        for i, (row, keyword) in enumerate(usable[:TRAINING_ROWS])
    ]


def held_out_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows with a sentence of the reference answer that meets the constraints, as `response`."""
    found = []
    for row in rows:
        sentences = re.split(r"(?<=[.!?])\s+", row["response"])
        fitting = [(s, k) for s in sentences for k in content_words(row["prompt"]) if fits(s, k)]
        if fitting:
            sentence, keyword = fitting[0]
            limit = next(n for n in LIMITS if len(sentence.split()) <= n)
            found.append({**constrained(row, limit, keyword), "response": sentence})
    return found


def fits(sentence: str, keyword: str) -> bool:
    """Whether a sentence can serve as the reference answer."""
    long_enough = MIN_WORDS <= len(sentence.split()) <= LIMITS[-1]
    return long_enough and sentence.endswith(".") and keyword in words(sentence)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    train = training_rows(row for _, row in read_rows(DATA / "rl_prompts.jsonl"))
    held_out = held_out_rows(row for _, row in read_rows(DATA / "eval_prompts.jsonl"))
    for name, rows in (("train", train), ("eval", held_out)):
        file = out / f"constraints_{name}.jsonl"
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{file}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
