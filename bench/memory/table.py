"""Run against measured peaks of many shapes, lengths and limits.

usage: python bench/memory/table.py [--json FILE] [--only gemma-2b]

Runs `bench/memory/measure.py` once for each row, in a process of its own, and prints the table of
docs/memory.md. A CPU that is used by other programs takes longer and prints the same bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_grpo.console.output import Console
from mlx_grpo.files.atomic import write_json
from mlx_grpo.plan.memory import HEAD_BYTES

SMALL = "--shape smollm2-135m"
FOUR = f"{SMALL} --depth 4 --prompts 2"
LLAMA = "--shape llama-3.2-1b --prompts 1 --k 6 --prompt 64 --completion 24"
QWEN = "--shape qwen2.5-0.5b --depth 2 --prompts 1 --prompt 64 --completion 24"
GEMMA = "--shape gemma-2b --weights dense --prompts 1 --prompt 256 --completion 256 --iterations 1"
PACKED = (
    "--shape gemma-2b --weights packed --rm adapter --prompts 1 --k 2 --prompt 16 --completion 4"
    " --iterations 1"
)
SWAPPED = "--rm full --residency swap --sizes 0 256 32"

COLUMNS = (
    "shape, blocks",
    "prompts x answers, tokens",
    "reward model",
    "limit",
    "cut to",
    "planned",
    "measured",
    "off by",
)

ROWS = (
    f"{SMALL} --rm none --prompts 1 --k 6 --prompt 48 --completion 64",
    f"{SMALL} --rm adapter --prompts 4 --k 6 --prompt 40 --completion 32",
    f"{FOUR} --rm adapter --k 4 --prompt 48 --completion 16",
    f"{FOUR} --rm adapter --k 6 --prompt 64 --completion 48",
    f"{FOUR} --rm adapter --k 6 --prompt 64 --completion 48 --limit 0.24GB",
    f"{FOUR} --rm adapter --k 6 --prompt 64 --completion 48 --limit 0.21GB",
    f"{FOUR} --rm full --k 6 --prompt 64 --completion 48",
    f"{FOUR} --rm full --k 6 --prompt 64 --completion 48 --limit 0.24GB",
    f"{LLAMA} --rm adapter --depth 1",
    f"{LLAMA} --rm adapter --depth 2 --limit 1.66GB",
    f"{QWEN} --rm none --k 4",
    f"{QWEN} --rm adapter --k 8",
    f"{PACKED} --depth 1",
    f"{PACKED} --depth 2",
    f"{GEMMA} {SWAPPED} --depth 1",
    f"{GEMMA} {SWAPPED} --depth 2",
)


def run(flags: str) -> dict[str, Any]:
    """What `bench/memory/measure.py` found with these flags."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.json"
        command = [sys.executable, Path(__file__).with_name("measure.py"), *flags.split()]
        subprocess.run([*command, "--json", found], check=True, stdout=subprocess.DEVNULL)
        line: dict[str, Any] = json.loads(found.read_text())
        return line


def peaks(line: dict[str, Any]) -> tuple[float, float]:
    """Run and measured bytes of the iteration."""
    return max(line["planned"].values()), max(s["bytes"] for s in line["measured"].values())


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    planned, measured = peaks(line)
    sizes, swap = line["choice"]["sizes"], line["choice"]["swap"]
    cuts = (
        f"{sizes['rows']} a pass" if sizes["rows"] else "",
        f"MLP {sizes['mlp_tokens']}" if sizes["mlp_tokens"] else "",
        f"head {head >> 20} MiB" if (head := sizes["head_bytes"]) < HEAD_BYTES[0] else "",
    )
    return (
        f"{line['shape']}, {line['depth'] or 'all'}{'' if line['choice']['dense'] else ', 4-bit'}",
        f"{line['prompts']} x {line['k']}, {line['prompt']} + {line['completion']}",
        line["rm"] + (", read anew" if swap else ""),
        line["limit"] or "-",
        ", ".join(filter(None, cuts)) or "-",
        f"{planned / 1e9:.3f} GB",
        f"{measured / 1e9:.3f} GB",
        f"{planned / measured - 1:+.1%}",
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="rows whose flags contain this")
    args = parser.parse_args()
    ui, lines = Console(), []
    for flags in ROWS:
        if args.only in flags:
            lines.append(run(flags))
            ui.say("  ".join(cells(lines[-1])))
    ui.table(
        "Peak of an iteration on this machine: planned against measured",
        COLUMNS,
        [cells(line) for line in lines],
    )
    if args.json:
        write_json(args.json, {"rows": lines})


if __name__ == "__main__":
    main()
