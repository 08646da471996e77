"""Does an iteration's time grow linearly with prompts and with tokens?

usage: python bench/speed/linear_growth.py [--shape smollm2-135m] [--json FILE]

Seconds of each stage (`bench/speed/tokens_per_second.py`) for 1, 2, 4, 8 and 16 prompts of six
answers of 64 tokens, and for 4 prompts with answers of 32, 64, 128 and 256 tokens. The last column
is the time per answer token against the line above it: 1.0 is linear, less is better than linear.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
from pathlib import Path
from typing import Any

from bench.shapes import SHAPES, random_model
from bench.speed.tokens_per_second import Bench, K, make_bench, run_stages

PROMPTS = ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64))
TOKENS = ((4, 32), (4, 64), (4, 128), (4, 256))
LINE = "{:>7} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>13} {:>9}"
HEAD = (
    "prompts",
    "tokens",
    "rollout",
    "reward",
    "log-prob",
    "update",
    "all",
    "ms per token",
    "growth",
)


def measure(bench: Bench, cases: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Run the cases in turn and print a line for each."""
    print(LINE.format(*HEAD))
    results: list[dict[str, Any]] = []
    for prompts, tokens in cases:
        seconds = run_stages(bench, prompts * K, tokens)
        whole = sum(seconds.values())
        each = whole / (prompts * K * tokens)
        growth = each / results[-1]["seconds_per_token"] if results else 1.0
        shown = [f"{s:.2f}" for s in (*seconds.values(), whole)]
        print(
            LINE.format(prompts, tokens, *shown, f"{1e3 * each:.2f}", f"{growth:.2f}"), flush=True
        )
        results.append(
            {"prompts": prompts, "tokens": tokens, "seconds_per_token": each, "seconds": seconds}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    bench = make_bench(random_model(args.shape), args.prompt, 0)
    run_stages(bench, 1, 4)  # MLX compiles kernels at run time
    found = {"by_prompts": measure(bench, PROMPTS), "by_tokens": measure(bench, TOKENS)}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
