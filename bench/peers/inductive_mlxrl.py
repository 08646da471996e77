"""inductive-mlxrl 0.2.4 at its best: groups decoded together, compiled; or with checkpointing.

usage: python bench/peers/inductive_mlxrl.py [--variant compiled|checkpointed] [--prompts N]

Its fast path needs answers that do not end early, which is so here.
"""

import argparse
import time
from typing import Any

import common
from common import LEARNING_RATE, MODEL, RANK, SCALE, K, Stopwatch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import mlx.optimizers as optim
    from mlxrl.algo.grpo import GRPOAlgorithm
    from mlxrl.policy.model import LoRAConfig, load_policy_with_lora
    from mlxrl.rollout.naive import SamplingConfig
    from mlxrl.rollout.optimized import generate_prefix_cached_group_rollouts
    from mlxrl.train.grpo import batch_from_rollouts, optimizer_step

    model, tokenizer, _ = load_policy_with_lora(str(MODEL), LoRAConfig(rank=RANK, scale=SCALE))
    optimizer = optim.Adam(learning_rate=LEARNING_RATE)
    checkpointed = args.variant == "checkpointed"
    sampling = SamplingConfig(max_tokens=args.tokens, temperature=1.0, top_p=1.0)
    algorithm, pad = GRPOAlgorithm(), tokenizer.pad_token_id
    watch, seconds = Stopwatch(), []
    roll_out = watch.around(generate_prefix_cached_group_rollouts)
    questions = [r["messages"][-1]["content"] for r in common.prompts(args.prompts)]
    for iteration in range(1 + args.iterations):
        start = time.perf_counter()
        completions = roll_out(
            model,
            tokenizer,
            questions,
            K,
            sampling,
            seed=iteration,
            compile_decode_step=True,
            batch_groups=True,
        )
        if args.rollout_only:
            continue
        rewards = common.length_reward([c.text for c in completions])
        batch = batch_from_rollouts(
            model, completions, rewards, K, pad, algorithm, use_checkpoint=checkpointed
        )
        optimizer_step(model, optimizer, batch, 0.04, pad, algorithm, use_checkpoint=checkpointed)
        seconds.append(time.perf_counter() - start)
    peak = common.mlx_peak_gb()
    return common.result(args, K * args.prompts, watch.seconds, seconds, peak)


if __name__ == "__main__":
    requirements = (*common.MLX, "inductive-mlxrl==0.2.4")
    common.main(measure, requirements, variants=("compiled", "checkpointed"))
