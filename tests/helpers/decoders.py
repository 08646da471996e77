"""Small random decoders of every family, and what each of them has to get right."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.llama import LlamaModel
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import _get_classes

from bench.decoders import decoder_config
from bench.shapes import NoTokenizer, move_lora
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Prompt
from mlx_grpo.grpo.loss import Clip, LossInputs, clipped_surrogate, token_weights
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.models.backbone import share
from mlx_grpo.models.decoder import Decoder, Sizes, shift_right
from mlx_grpo.models.lora import (
    add_lora,
    load_adapter,
    lora_parameters,
    save_adapter,
    set_parameters,
)
from mlx_grpo.models.prompt_caches import caches_of_whole_sequences
from mlx_grpo.models.reward_model import RewardModel
from tests.helpers.groups import LENGTHS, PROMPT, group_of, staged_gradients

LARGEST = 2_000_000
"""Parameters of a small decoder."""


class Doubling(LlamaModel):
    """Its code does something to hidden states between two blocks."""

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> Any:
        h = self.embed_tokens(inputs)
        caches = cache or [None] * len(self.layers)
        mask = create_attention_mask(h, caches[0])
        for layer, one in zip(self.layers, caches, strict=True):
            h = 2 * layer(h, mask, cache=one)
        return self.norm(h)


def small_decoder(name: str) -> nn.Module:
    """A model of one of the configurations, every parameter drawn from its name, frozen."""
    config = decoder_config(name)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    assert sum(v.size for _, v in tree_flatten(model.parameters())) < LARGEST
    drawn = []
    for path, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            noise = mx.random.normal(value.shape, key=key(0, "small", name, path))
            drawn.append((path, 0.15 * noise if value.ndim > 1 else value + 0.05 * noise))
    model.update(tree_unflatten(drawn))
    model.update(
        tree_map(lambda v: v.astype(mx.float32) if _floating(v) else v, model.parameters())
    )
    mx.eval(model.parameters())
    model.freeze()
    return model.eval()


def _floating(value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating)


def actor_on(model: nn.Module) -> nn.Module:
    """The model with a LoRA that has left its starting point, in train mode."""
    actor = add_lora(model, rank=4, scale=2.0, seed=1, expert_rank=2)
    move_lora(actor, 0.1, seed=2)
    return actor.train()


def whole_logits(model: nn.Module, prompt: list[int], rows_KT: mx.array) -> mx.array:
    """Logits that predict each completion token, of whole sequences, [K, T, V]."""
    prompts = mx.broadcast_to(mx.array([prompt]), (rows_KT.shape[0], len(prompt)))
    rows = mx.concatenate([prompts, rows_KT], axis=1)
    caches = caches_of_whole_sequences(model)
    return model(rows[:, :-1], cache=caches)[:, len(prompt) - 1 :].astype(mx.float32)


def forward_gap(model: nn.Module) -> float:
    """Largest difference of staged logits to the model's own, relative to its largest."""
    group = group_of()
    prompt, rows_KT = list(group.prompt_ids), group.tokens_KT
    expected = whole_logits(model, prompt, rows_KT)
    decoder = Decoder(model)
    found = decoder.head(shift_right(*decoder.forward(mx.array([prompt]), rows_KT)))
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def gradient_gap(actor: nn.Module, kept: int = 0) -> float:
    """Largest relative difference of staged gradients to plain `value_and_grad`."""
    group, clip = group_of(), Clip()
    weights = token_weights(group.mask_KT, "sequence", len(LENGTHS), sum(LENGTHS), max(LENGTHS))
    parameters = lora_parameters(actor)

    def loss(values: dict[str, mx.array]) -> mx.array:
        set_parameters(actor, values)
        logits = whole_logits(actor, list(group.prompt_ids), group.tokens_KT)
        picked = mx.take_along_axis(logits, group.tokens_KT[..., None], axis=-1)[..., 0]
        logp = picked - mx.logsumexp(logits, axis=-1)
        inputs = LossInputs(group.sampled_logp_KT, group.advantages_K, group.mask_KT, weights)
        return clipped_surrogate(logp, inputs, clip)[0]

    _, expected = mx.value_and_grad(loss)(parameters)
    set_parameters(actor, parameters)
    found, _ = staged_gradients(Decoder(actor, Sizes(kept_blocks=kept)), group, weights, clip)
    assert found.keys() == expected.keys()
    largest = max(mx.abs(g).max().item() for g in expected.values())
    assert largest > 0

    def gap(name: str) -> float:
        own = mx.abs(expected[name]).max().item()
        return mx.abs(found[name] - expected[name]).max().item() / max(own, 1e-3 * largest)

    return max(map(gap, expected))


def greedy(model: nn.Module, prompt: tuple[int, ...], stop: frozenset[int], most: int) -> list[int]:
    """The likeliest tokens, each from the whole text: no cache is kept."""
    ids = list(prompt)
    for _ in range(most):
        caches = caches_of_whole_sequences(model)
        ids.append(int(model(mx.array([ids]), cache=caches)[0, -1].argmax().item()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def rollouts_agree(model: nn.Module, most: int = 12) -> bool:
    """Whether greedy rollouts of three prompts of different length, finished rows dropped, are
    those of a loop that keeps no cache."""
    prompts = [
        Prompt(f"p{n}", (), tuple(mx.random.randint(0, 250, (n,), key=key(5, n)).tolist()))
        for n in (PROMPT, 4, 1)
    ]
    free = [greedy(model, p.token_ids, frozenset(), most) for p in prompts]
    stop = frozenset({free[1][most // 2]})  # so that rows end at different lengths
    expected = [greedy(model, p.token_ids, stop, most) for p in prompts]
    groups = rollout(model, NoTokenizer(), stop, prompts, Sampling(3, most, 0.0), 0, "sweep")
    return all(
        list(c.token_ids) == ids
        for g, ids in zip(groups, expected, strict=True)
        for c in g.completions
    )


def reward_gap(model: nn.Module) -> float:
    """Largest difference of scores of padded rows behind a shared prompt to those of each text
    alone, relative to their spread."""
    group = group_of()
    decoder = Decoder(model)
    head_1D = mx.random.normal((1, decoder.hidden_size), key=key(7))
    reward = RewardModel(decoder, head_1D, None, None)
    rows = [tuple(group.tokens_KT[i, :n].tolist()) for i, n in enumerate(LENGTHS)]
    together = reward.score_ids(group.prompt_ids, rows)
    alone = [reward.score_ids(group.prompt_ids[:1], [group.prompt_ids[1:] + r])[0] for r in rows]
    spread = max(alone) - min(alone)
    return max(abs(a - b) for a, b in zip(together, alone, strict=True)) / spread


def adapters_agree(model: nn.Module, actor: nn.Module, directory: Path) -> bool:
    """Whether a saved adapter is the same here and in mlx-lm."""
    ids = mx.array([group_of().prompt_ids])
    expected = actor.eval()(ids)
    save_adapter(directory, actor)
    here = load_adapter(model, directory)(ids)
    there = load_adapters(share(model), str(directory)).eval()(ids)
    close = 1e-4 * mx.abs(expected).max().item()
    return all(mx.abs(v - expected).max().item() < close for v in (here, there))
