"""Which of two answers would a reader rather have been given? Twenty prompts, without saying whose.

usage: python -m bench.learning.blind RUN  # writes RUN/blind.md, a sheet to read
       python -m bench.learning.blind RUN --choices ABTAA...  # counts; writes RUN/blind.json

The SFT model and the run's adapter answer greedily. Prompts are drawn by key from those that chose
nothing, and so is which answer stands first. Choices are a letter each: A, B, or T for a tie.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import sys
from pathlib import Path
from typing import Any

from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation, uniforms
from mlx_grpo.core.stats import win_rate
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.files.atomic import read_json, write_json, write_text

COUNT, SEED = 20, 42
ANSWERS, SHEET, FOUND = "blind-answers.json", "blind.md", "blind.json"
LETTERS = "AB"
WHO = ("SFT", "trained")
POINTS = {"trained": 1.0, "tie": 0.5, "SFT": 0.0}


def answers(run: Path, ui: Console) -> list[dict[str, Any]]:
    """Drawn prompts with both answers; `trained` is the place, 0 or 1, of the adapter's."""
    file = run / ANSWERS
    if not file.exists():
        found = compare_run(run, None, "", ui, temperature=0.0)
        before, after = found.before.groups, found.after.groups
        drawn = permutation(SEED, "blind", n=len(before))[:COUNT]
        first = uniforms(SEED, [("blind", i) for i in drawn]).tolist()
        rows = []
        for i, u in zip(drawn, first, strict=True):
            sides = [before[i].completions[0].text, after[i].completions[0].text]
            trained = int(u < 0.5)
            rows.append(
                {
                    "prompt": before[i].prompt.messages[-1]["content"],
                    "answers": sides if trained else sides[::-1],
                    "trained": trained,
                }
            )
        write_json(file, {"rows": rows})
    return list(read_json(file)["rows"])


def sheet(rows: list[dict[str, Any]]) -> str:
    """What the reader sees."""
    blocks = [
        f"## {n}. {row['prompt']}\n\n**A**: {row['answers'][0]}\n\n**B**: {row['answers'][1]}\n"
        for n, row in enumerate(rows, 1)
    ]
    return "\n".join(blocks)


def counted(rows: list[dict[str, Any]], choices: str) -> list[dict[str, Any]]:
    """Rows with whom the reader chose.

    Raises:
        InputError: not a letter for each.
    """
    if len(choices) != len(rows) or not set(choices) <= {*LETTERS, "T"}:
        raise InputError(f"--choices: give {len(rows)} letters, each A, B or T")
    return [
        {
            "prompt": row["prompt"],
            "SFT": row["answers"][1 - row["trained"]],
            "trained": row["answers"][row["trained"]],
            "chosen": "tie" if letter == "T" else WHO[letter == LETTERS[row["trained"]]],
        }
        for row, letter in zip(rows, choices, strict=True)
    ]


def main() -> int:
    """Write the sheet, or count the choices."""
    given = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given.add_argument("run", type=Path)
    given.add_argument("--choices", default="")
    args, ui = given.parse_args(), Console()
    try:
        rows = answers(args.run, ui)
        if not args.choices:
            write_text(args.run / SHEET, sheet(rows))
            ui.say(f"{args.run / SHEET}: {len(rows)} prompts")
            return 0
        found = counted(rows, args.choices)
    except InputError as e:
        ui.error(str(e))
        return 2
    write_json(args.run / FOUND, {"rows": found})
    won = win_rate([POINTS["tie"]] * len(found), [POINTS[row["chosen"]] for row in found])
    ties = "1 tie counts half" if won.ties == 1 else f"{won.ties} ties count half"
    ui.say(f"adapter preferred: {won} of {won.prompts} prompts; {ties}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
