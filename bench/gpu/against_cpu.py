"""Numbers of packed 16-bit models on this device against the same weights in dense fp32 on the CPU.

usage: python -m bench.gpu.against_cpu [--shape smollm2-135m] [--json FILE]

Random weights of the shape, the same on both. One group of six sampled answers: log-probs of
sampling, of scoring and of the CPU; the gradient of the clipped surrogate; seconds of a rollout and
an update.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from bench.shapes import SHAPES, NoTokenizer
from bench.speed.staged_backward import update_settings
from mlx_grpo.backend.device import device_name
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.padding import completion_arrays
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Group, Parameters, Prompt, TrainingGroup
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import token_weights
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.update import surrogate_gradients
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters

K, PROMPT, COMPLETION = 6, 48, 24


def actor_of(shape: str, precision: Precision) -> Decoder:
    """4-bit weights of the shape with a LoRA that has left its starting point; the same draw for
    every precision and device."""
    config = SHAPES[shape]
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    with mx.stream(mx.cpu):
        mx.random.seed(0)
        shapes = {n: v.shape for n, v in tree_flatten(model.parameters())}
        drawn = [
            (n, 0.02 * mx.random.normal(s, key=key(0, n)) if len(s) > 1 else mx.ones(s))
            for n, s in shapes.items()
        ]
        model.update(tree_unflatten(drawn))
        model.set_dtype(mx.float16)
        nn.quantize(model, group_size=64, bits=4)
        mx.eval(model.parameters())
    apply_precision(model, precision)
    model.freeze()
    actor = add_lora(model, 16, 2.0, seed=0)
    with mx.stream(mx.cpu):
        moved = {
            n: 0.01 * mx.random.normal(v.shape, key=key(1, n))
            for n, v in lora_parameters(actor).items()
        }
        mx.eval(moved)
    set_parameters(actor, moved)
    return Decoder(actor)


def gradient(actor: Decoder, group: TrainingGroup) -> Parameters:
    """Of the clipped surrogate."""
    weights_KT = token_weights(group.mask_KT, "sequence", 16 * K, 1, 1)
    settings = update_settings(COMPLETION)
    return surrogate_gradients(actor, [group], [None], [weights_KT], settings)[3]


def cosine(a: Parameters, b: Parameters) -> float:
    """Between two gradients of any size."""
    x, y = (mx.concatenate([v[n].reshape(-1) for n in sorted(v)]) for v in (a, b))
    x, y = x / mx.abs(x).max(), y / mx.abs(y).max()
    return ((x * y).sum() / mx.sqrt((x * x).sum() * (y * y).sum())).item()


def difference(a: mx.array, b: mx.array) -> dict[str, float]:
    """Largest and mean, nats."""
    gap = mx.abs(a - b)
    return {"largest": gap.max().item(), "mean": gap.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    here = mx.default_device()
    ids = mx.random.randint(5, 500, (PROMPT,), key=key(2)).tolist()
    prompt = Prompt("p", (), tuple(ids))
    figures: dict[str, Any] = {"shape": args.shape, "device": device_name()}
    found: dict[str, tuple[mx.array, Parameters]] = {}
    group: Group | None = None
    for name, dtype in (("bf16", mx.bfloat16), ("fp16", mx.float16), ("cpu", mx.float32)):
        mx.set_default_device(mx.cpu if name == "cpu" else here)
        actor = actor_of(args.shape, Precision(device_name(), name == "cpu", dtype))
        marks = [time.perf_counter()]
        drawn = rollout(
            actor.model, NoTokenizer(), frozenset(), [prompt], Sampling(K, COMPLETION), 1, "bench"
        )
        marks.append(time.perf_counter())
        group = group or drawn[0]
        tokens_KT, mask_KT = completion_arrays(group.completions)
        scored_KT = token_logps(actor, mx.array([ids]), tokens_KT, mask_KT)
        own = drawn[0].completions
        again_KT = token_logps(actor, mx.array([ids]), *completion_arrays(own))
        sampled_KT = mx.array([c.logps for c in own])
        advantages_K = mx.array([1.0, -1.0, 0.5, -0.5, 0.2, -0.2])
        training = TrainingGroup(0, prompt.token_ids, tokens_KT, mask_KT, scored_KT, advantages_K)
        start = time.perf_counter()
        found[name] = scored_KT, gradient(actor, training)
        mx.eval(found[name])
        figures[name] = {
            "sampled against scored": difference(sampled_KT, again_KT),
            "rollout seconds": marks[1] - marks[0],
            "update seconds": time.perf_counter() - start,
        }
    mx.set_default_device(mx.cpu)
    exact_KT, exact = found.pop("cpu")
    figures["log_probs"] = {n: difference(logps, exact_KT) for n, (logps, _) in found.items()}
    figures["gradient_cosine"] = {n: cosine(g, exact) for n, (_, g) in found.items()}
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
