"""Staged backward against plain value_and_grad: gradients, peak memory above the weights, seconds.

usage: python bench/speed/staged_backward.py [--shape smollm2-135m|families] [--prompt 64]
           [--completion 64] [--K 6] [--runs 3]

Random weights, LoRA 16 on all linear layers, one group. `smollm2-135m` is that model's shape;
`families` are nine families at width 256. `plain` runs K whole sequences through
`mx.value_and_grad`, as other trainers do; `checkpointed` is the same with mlx-lm's gradient
checkpointing; `staged` is this project's backward, `blocks kept` the same where all blocks keep
their arrays, so that none runs twice. The ways take turns; the first turn is dropped (MLX compiles
for the CPU at run time), of the others the fastest counts.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.utils import _get_classes

from bench.families import FAMILIES, family_config
from bench.shapes import SHAPES, move_lora
from mlx_grpo.backend.device import device_name
from mlx_grpo.backend.kernels import use_fast_swiglu
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Parameters, TrainingGroup
from mlx_grpo.grpo.loss import Clip, LossInputs, clipped_surrogate, token_weights
from mlx_grpo.grpo.update import UpdateSettings, surrogate_gradients
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters


def random_actor(config: dict[str, Any]) -> nn.Module:
    """A model of the shape with random weights and a LoRA that has left its starting point."""
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    model.freeze()
    actor = add_lora(model, rank=16, scale=2.0, seed=0)
    move_lora(actor, 0.02, seed=1)
    mx.eval(actor.parameters())
    return actor


def random_group(k: int, prompt: int, completion: int, vocabulary: int) -> TrainingGroup:
    """A group with ratios around one."""
    tokens_KT = mx.random.randint(0, vocabulary, (k, completion), key=key(2, "tokens"))
    ids = mx.random.randint(0, vocabulary, (prompt,), key=key(2, "prompt")).tolist()
    old_KT = -10 + 0.1 * mx.random.normal((k, completion), key=key(2, "old"))
    advantages_K = mx.random.normal((k,), key=key(2, "advantages"))
    mask_KT = mx.ones((k, completion))
    mx.eval(tokens_KT, old_KT, advantages_K, mask_KT)
    return TrainingGroup(0, tuple(ids), tokens_KT, mask_KT, old_KT, advantages_K)


def update_settings(max_tokens: int) -> UpdateSettings:
    """Of one group an optimizer step."""
    return UpdateSettings(
        clip=Clip(),
        aggregation="sequence",
        temperature=1.0,
        max_tokens=max_tokens,
        max_grad_norm=1.0,
        minibatch_size=1,
        epochs=1,
        kl_stop=1.0,
    )


def plain_gradients(actor: nn.Module, group: TrainingGroup, weights_KT: mx.array) -> Parameters:
    """The textbook way: K whole sequences in one graph."""
    k, prompt = group.tokens_KT.shape[0], len(group.prompt_ids)
    prompts = mx.broadcast_to(mx.array([group.prompt_ids]), (k, prompt))
    whole = mx.concatenate([prompts, group.tokens_KT], axis=1)
    parameters = lora_parameters(actor)

    def loss(values: Parameters) -> mx.array:
        set_parameters(actor, values)
        logits = actor(whole[:, :-1])[:, prompt - 1 :].astype(mx.float32)
        picked = mx.take_along_axis(logits, group.tokens_KT[..., None], axis=-1)[..., 0]
        logp_KT = picked - mx.logsumexp(logits, axis=-1)
        inputs = LossInputs(group.sampled_logp_KT, group.advantages_K, group.mask_KT, weights_KT)
        return clipped_surrogate(logp_KT, inputs, Clip())[0]

    _, gradients = mx.value_and_grad(loss)(parameters)
    mx.eval(gradients)
    set_parameters(actor, parameters)
    return gradients


@dataclass(frozen=True)
class Measured:
    """What one way took."""

    gradients: Parameters
    peak: float
    """MB above what was held before."""
    seconds: float


def measured(compute: Callable[[], Parameters]) -> Measured:
    """Run once."""
    mx.clear_cache()
    mx.reset_peak_memory()
    held, start = mx.get_active_memory(), time.perf_counter()
    gradients = compute()
    seconds = time.perf_counter() - start
    return Measured(gradients, (mx.get_peak_memory() - held) / 1e6, seconds)


@contextmanager
def checkpointing(block: nn.Module) -> Iterator[None]:
    """mlx-lm's gradient checkpointing, which patches the class, for every instance."""
    call = type(block).__call__
    grad_checkpoint(block)
    try:
        yield
    finally:
        type(block).__call__ = call


@contextmanager
def our_activation(actor: nn.Module) -> Iterator[None]:
    """The faster SwiGLU that mlx-grpo uses on a CPU; the other ways keep mlx-lm's."""
    family = sys.modules[type(actor).__module__]
    theirs = getattr(family, "swiglu", None)
    if device_name() == "cpu":
        use_fast_swiglu(actor)
    try:
        yield
    finally:
        if theirs:
            family.swiglu = theirs


def compare(name: str, config: dict[str, Any], args: argparse.Namespace) -> None:
    """Measure one shape, the ways in turn, and print a line per way."""
    actor = random_actor(config)
    group = random_group(args.K, args.prompt, args.completion, config["vocab_size"])
    tokens = args.K * args.completion
    weights_KT = token_weights(group.mask_KT, "sequence", args.K, tokens, args.completion)
    settings = update_settings(args.completion)
    lean = Decoder(actor)
    roomy = Decoder(actor, Sizes(kept_blocks=len(lean.blocks)))

    def plain() -> Parameters:
        return plain_gradients(actor, group, weights_KT)

    def staged(decoder: Decoder) -> Parameters:
        old = [group.sampled_logp_KT]
        return surrogate_gradients(decoder, [group], old, [weights_KT], settings)[3]

    results: dict[str, Measured] = {}
    for run in range(1 + args.runs):
        found = {"plain": measured(plain)}
        with checkpointing(actor.layers[0]):
            found["checkpointed"] = measured(plain)
        with our_activation(actor):
            found["staged"] = measured(lambda: staged(lean))
            found["blocks kept"] = measured(lambda: staged(roomy))
        if run:
            for way, m in found.items():
                results[way] = min(results.get(way, m), m, key=lambda m: m.seconds)
    expected = results["plain"].gradients
    for way, m in results.items():
        worst = max(
            (mx.abs(m.gradients[n] - g).max() / mx.abs(g).max()).item() for n, g in expected.items()
        )
        print(
            f"{name:13s} {way:13s} peak above the weights {m.peak:6.0f} MB  {m.seconds:6.2f} s  "
            f"largest relative gradient difference to plain {worst:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("smollm2-135m", "families"), default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--K", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if args.shape == "smollm2-135m":
        compare(args.shape, SHAPES[args.shape], args)
    else:
        for family in FAMILIES:
            compare(family, family_config(family, 256, 8192), args)


if __name__ == "__main__":
    main()
