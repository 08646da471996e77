"""What would it save to run the blocks below a reward adapter once, for reward and reference?

usage: python -m bench.speed.shared_blocks [--model weights/sft-4bit]
           [--reward weights/rm-4bit] [--runs 3]

A reward adapter on the last blocks leaves the lower ones as the reference's, so the reference could
go on from what the reward model has computed. This runs iterations as in the demo, and beside each
the lower blocks alone over the completions that the KL is measured on: the seconds which sharing
could save at the most, because handing states over is not free. The settings take turns; the first
turn is dropped, medians of the others.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench.learning.common import ready_to_time
from mlx_grpo.config.settings import with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.padding import completion_arrays, length_buckets, row_lengths
from mlx_grpo.core.types import Group
from mlx_grpo.demo import DEMO
from mlx_grpo.files.assets import asset
from mlx_grpo.files.atomic import read_json
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.grpo.reference import measured_rows
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.reward_model import reward_config

VARIANTS: dict[str, dict[str, Any]] = {
    "KL of all completions": {"update_rows": 0, "kl_share": 1.0},
    "defaults": {"update_rows": 3, "kl_share": 0.125},
}
"""What is changed against the demo."""


def seconds_below(
    reference: Decoder, groups: Sequence[Group], measured: Sequence[Sequence[int]], blocks: int
) -> float:
    """Of the first blocks over the measured completions, as the KL runs them."""
    start = time.perf_counter()
    for group, rows in zip(groups, measured, strict=True):
        if not rows:
            continue
        tokens_NT, mask_NT = completion_arrays([group.completions[i] for i in rows])
        lengths, prompt_1S = row_lengths(mask_NT), mx.array([group.prompt.token_ids])
        for bucket in length_buckets(lengths, prompt_1S.shape[1], reference.sizes.rows):
            longest = max(lengths[i] for i in bucket)
            entered = reference.embed(prompt_1S, tokens_NT[mx.array(bucket), :longest])
            states: tuple[mx.array, ...] = (entered.h_prompt, entered.h_rows)
            for i in range(blocks):
                states = reference.run_block(entered, i, *states)
                mx.eval(states)
    return time.perf_counter() - start


def main() -> None:
    """Print a table with a line for each variant."""
    given = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given.add_argument("--model", default="weights/sft-4bit")
    given.add_argument("--reward", default="weights/rm-4bit")
    given.add_argument("--runs", type=int, default=3)
    args = given.parse_args()
    if reward_config(Path(args.reward))["kind"] != "adapter":
        given.error(f"{args.reward}: not a reward adapter, which alone has blocks to share")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in VARIANTS}
    with ExitStack() as open_:
        runs = {}
        for name, changed in VARIANTS.items():
            config = with_settings(
                DEMO,
                actor_model=args.model,
                rm_model=args.reward,
                prompts=str(asset("data/rl_prompts.jsonl")),
                eval_prompts=str(asset("data/eval_prompts.jsonl")),
                output=str(Path("runs") / "shared-blocks"),
                **changed,
            )
            runs[name] = ready_to_time(config, open_)
        blocks = len(next(iter(runs.values()))[0].roles.reference.blocks)
        below = blocks - read_json(Path(args.reward) / "adapter_config.json")["num_layers"]
        for turn in range(1 + args.runs):
            for name, (learner, state) in runs.items():
                config, done = learner.config, iterate(learner, state, Console(quiet=True))
                count = config.kl.measured(config.data.batch_size * config.rollout.K)
                rows = measured_rows(
                    config.run.seed, state.iteration, len(done.groups), config.rollout.K, count
                )
                saved = seconds_below(learner.roles.reference, done.groups, rows, below)
                whole, kl = (done.metrics[f"time/{stage}"] for stage in ("iteration", "logprob"))
                if turn:
                    found[name].append((whole, kl, saved))
                runs[name] = (learner, done.state)
    Console().table(
        f"{below} of {blocks} blocks lie below the reward adapter",
        ("", "an iteration", "reference", "its lower blocks", "of the iteration"),
        [_line(name, rows) for name, rows in found.items()],
    )


def _line(name: str, found: Sequence[tuple[float, float, float]]) -> tuple[str, ...]:
    share = statistics.median(saved / whole for whole, _, saved in found)
    seconds = (f"{statistics.median(column):.2f} s" for column in zip(*found, strict=True))
    return name, *seconds, f"{share:.1%}"


if __name__ == "__main__":
    main()
