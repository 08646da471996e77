"""mlx-lm's own `BatchGenerator`, rollouts alone, all rows at once, with an unmerged LoRA.

usage: python bench/peers/batch_generator.py [--prompts N]
"""

import argparse
import time
from typing import Any

import common
from common import MODEL, RANK, SCALE, K


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import mlx.nn as nn
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load(str(MODEL))
    model.freeze()
    layer = model.layers[0]
    linears = sorted(n for n, m in layer.named_modules() if isinstance(m, nn.Linear))
    lora = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": linears}
    linear_to_lora_layers(model, len(model.layers), lora)
    seconds = []
    every = [r["ids"] for r in common.prompts(args.prompts) for _ in range(K)]
    for iteration in range(1 + args.iterations):
        rows = every if iteration else every[:K]
        start = time.perf_counter()
        generator = BatchGenerator(
            model,
            sampler=make_sampler(1.0),
            completion_batch_size=len(rows),
            prefill_batch_size=len(rows),
        )
        generator.insert(rows, [args.tokens] * len(rows))
        tokens = 0
        while responses := generator.next_generated():
            tokens += len(responses)
        generator.close()
        seconds.append(time.perf_counter() - start)
        if tokens != len(rows) * args.tokens:
            raise RuntimeError(f"{tokens} tokens instead of {len(rows) * args.tokens}")
    return common.result(args, len(every), seconds, [], common.mlx_peak_gb())


if __name__ == "__main__":
    common.main(measure, common.MLX)
