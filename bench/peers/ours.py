"""mlx-grpo itself, in the environment that runs this script.

usage: python bench/peers/ours.py [--prompts N] [--iterations N] [--rollout-only]
           [--variant defaults|everything]

`everything` leaves out what the defaults save: all K completions are learned from in one step, and
the KL is measured on all of them. `defaults` takes its steps as a run does.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import LEARNING_RATE, PACKED, RANK, SCALE, SEED, K

from mlx_grpo.backend.device import peak_memory
from mlx_grpo.config.settings import TrainConfig, train_config
from mlx_grpo.console.output import Console
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.grpo.learner import Learner, first_state, sampling
from mlx_grpo.grpo.rollout import rollout
from mlx_grpo.models.lora import lora_parameters, set_parameters
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.training.setup import load_learner

EVERYTHING: dict[str, Any] = {"update_rows": 0, "kl_share": 1.0}
STEP = TrainConfig().optimizer.minibatch_size
"""Prompts of an optimizer step, with the defaults."""


def learner_for(args: argparse.Namespace, place: Path) -> Learner:
    """What a run on the model and prompts of the comparison works with."""
    rows = common.prompts(args.prompts)
    lines = [json.dumps({"id": str(i), "messages": r["messages"]}) for i, r in enumerate(rows)]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (place / "held_out.jsonl").write_text('{"prompt": "Hello", "response": "Hello!"}\n')
    everything = args.variant == "everything"
    config = train_config(
        actor_model=str(PACKED),
        rm_model="none",
        reward=(f"{Path(common.__file__).resolve()}:length_reward",),
        prompts=str(place / "prompts.jsonl"),
        eval_prompts=str(place / "held_out.jsonl"),
        seed=SEED,
        batch_size=args.prompts,
        minibatch_size=args.prompts if everything else min(args.prompts, STEP),
        K=K,
        max_completion_length=args.tokens,
        num_iterations=1 + args.iterations,
        learning_rate=LEARNING_RATE,
        lora_rank=RANK,
        lora_scale=SCALE,
        **(EVERYTHING if everything else {}),
    )
    return load_learner(config, Console(quiet=True))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        learner = learner_for(args, Path(place))
    _train_a_little(learner)
    state, console = first_state(learner.config), Console(quiet=True)
    rollouts, seconds, peaks = [], [], [peak_memory()]
    for iteration in range(1 + args.iterations):
        if args.rollout_only:
            rollouts.append(_rollout_seconds(learner, iteration))
            peaks.append(peak_memory())
            continue
        done = iterate(learner, state, console)
        state, metrics = done.state, done.metrics
        rollouts.append(metrics["time/rollout"])
        seconds.append(metrics["time/iteration"])
        peaks.append(metrics["memory/peak"])
    found = common.result(args, K * args.prompts, rollouts, seconds, max(peaks) / 1e9)
    if not args.rollout_only:
        found |= {k: v for k, v in metrics.items() if k.startswith("time/") and v}
    return found


def _train_a_little(learner: Learner) -> None:
    """Rollouts with a LoRA that is still zero would leave it out."""
    actor = learner.roles.actor.model
    arrays = {n: v + 1e-6 for n, v in lora_parameters(actor).items()}
    set_parameters(actor, arrays)


def _rollout_seconds(learner: Learner, iteration: int) -> float:
    start, backbone = time.perf_counter(), learner.roles.backbone
    with merged_for_rollout(backbone, learner.roles.actor.model) as model:
        rollout(
            model,
            backbone.tokenizer,
            backbone.stop_ids,
            learner.prompts if iteration else learner.prompts[:1],
            sampling(learner.config, K, learner.choice),
            SEED,
            "rollout",
            iteration,
        )
    return time.perf_counter() - start


if __name__ == "__main__":
    common.main(measure, (), variants=("defaults", "everything"))
