"""Sampling: the right distribution, the same tokens however rows are batched, clean ends."""

from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_grpo.core.rng import key, uniforms
from mlx_grpo.core.types import Group, Prompt
from mlx_grpo.grpo import rollout as rollouts
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.rollout import SAMPLER_BLOCK, Sampling, _invert, rollout, sample
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder
from tests.helpers.decoders import small_decoder
from tests.helpers.rounding import apart
from tests.helpers.tiny import EOS, VOCABULARY, tiny_model

PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": "x"},), tuple(range(40, 40 + n)))
    for i, n in enumerate((1, 5, 9, 3))
]


def draw(
    backbone: Backbone, prompts: list[Prompt], sampling: Sampling, seed: int = 1
) -> list[Group]:
    stop = frozenset({EOS, 7, 8})
    return rollout(backbone.model, backbone.tokenizer, stop, prompts, sampling, seed, "test")


def ids(groups: list[Group]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in g.completions] for g in groups]


def test_tokens_do_not_depend_on_how_rows_are_batched(backbone: Backbone) -> None:
    together = ids(draw(backbone, PROMPTS, Sampling(3, 24)))
    in_waves = ids(draw(backbone, PROMPTS, Sampling(3, 24, decode_rows=3)))
    alone = [ids(draw(backbone, [p], Sampling(3, 24)))[0] for p in PROMPTS]
    assert together == in_waves == alone


def test_sliding_windows_keep_rows_apart_too() -> None:
    model = tiny_model("gemma3_text")
    decoder = Decoder(model)
    sampling, stop = Sampling(2, 20), frozenset({EOS})
    together = rollout(model, _Decoder(), stop, PROMPTS, sampling, 1, "test")
    for prompt, group in zip(PROMPTS, together, strict=True):
        alone = rollout(model, _Decoder(), stop, [prompt], sampling, 1, "test")[0]
        assert [c.token_ids for c in group.completions] == [c.token_ids for c in alone.completions]
        for c in group.completions:
            row = mx.array([c.token_ids])
            again = token_logps(decoder, mx.array([prompt.token_ids]), row, mx.ones(row.shape))
            assert np.abs(np.array(c.logps) - np.array(again[0])).max() < 1e-4


BEGINNING = tuple(range(3, 43))
ENDS = ((50, 51, 52, 53, 54, 55), (60,) * 9, (61, 62))


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "mamba2", "lfm2", "gemma4_text shared", "qwen3_moe"]
)
@pytest.mark.parametrize("prefill", [512, 16])
def test_what_all_prompts_begin_with_is_computed_once_and_changes_nothing(
    name: str, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = small_decoder(name), []
    monkeypatch.setattr(rollouts, "SHARED_TOKENS", len(BEGINNING))
    monkeypatch.setattr(rollouts, "PREFILL_TOKENS", prefill)
    fill = rollouts._fill

    def noted(model: Any, caches: list[Any], tokens: tuple[int, ...]) -> None:
        seen.append(tokens)
        fill(model, caches, tokens)

    monkeypatch.setattr(rollouts, "_fill", noted)
    prompts = [Prompt(str(i), (), (*BEGINNING, *end)) for i, end in enumerate(ENDS)]
    sampling = Sampling(2, 10)
    together = rollout(model, _Decoder(), frozenset(), prompts, sampling, 1, "test")
    assert seen == [BEGINNING, *(end[:-1] for end in ENDS)]
    decoder = Decoder(model)
    for prompt, group in zip(prompts, together, strict=True):
        for c in group.completions:
            row = mx.array([c.token_ids])
            alone = token_logps(decoder, mx.array([prompt.token_ids]), row, mx.ones(row.shape))
            assert np.abs(np.array(c.logps) - np.array(alone[0])).max() < 1e-4


class _Decoder:
    """A stand-in for a tokenizer: a rollout only decodes."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_a_prompt_that_comes_twice_gets_other_samples(backbone: Backbone) -> None:
    first, second = ids(draw(backbone, [PROMPTS[1], PROMPTS[1]], Sampling(2, 12)))
    assert first == ids(draw(backbone, [PROMPTS[1]], Sampling(2, 12)))[0]
    assert not set(first) & set(second)


def test_more_samples_of_a_prompt_keep_the_first_ones(backbone: Backbone) -> None:
    few, many = (ids(draw(backbone, PROMPTS[:1], Sampling(k, 12)))[0] for k in (2, 5))
    assert many[:2] == few


def test_a_longer_limit_keeps_the_beginning(backbone: Backbone) -> None:
    short, long = (ids(draw(backbone, PROMPTS, Sampling(2, n))) for n in (5, 20))
    for few, more in zip(chain(*short), chain(*long), strict=True):
        assert more[: len(few)] == few


def test_a_completion_keeps_its_stop_token_and_nothing_after_it(backbone: Backbone) -> None:
    groups = draw(backbone, PROMPTS, Sampling(6, 60))
    completions = [c for g in groups for c in g.completions]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped and len(stopped) < len(completions)
    for c in completions:
        assert not {EOS, 7, 8} & set(c.token_ids[:-1])
        assert (c.token_ids[-1] in {EOS, 7, 8}) == (c.finish_reason == "stop")
        assert len(c.logps) == len(c.token_ids) <= 60
        assert c.finish_reason == "stop" or len(c.token_ids) == 60


def test_log_probs_of_the_rollout_are_those_of_the_training_forward(backbone: Backbone) -> None:
    decoder = Decoder(backbone.model)
    for temperature in (1.0, 0.6):
        group = draw(backbone, PROMPTS[2:3], Sampling(1, 16, temperature))[0]
        row = mx.array([group.completions[0].token_ids])
        prompt = mx.array([group.prompt.token_ids])
        again = token_logps(decoder, prompt, row, mx.ones(row.shape), temperature)
        assert np.abs(np.array(group.completions[0].logps) - np.array(again[0])).max() < apart(1e-5)


def test_temperature_zero_takes_the_likeliest_token(backbone: Backbone) -> None:
    group = draw(backbone, PROMPTS[2:3], Sampling(2, 4, temperature=0.0))[0]
    first, second = group.completions
    assert first.token_ids == second.token_ids
    logits = backbone.model(mx.array([group.prompt.token_ids]))[0, -1]
    assert first.token_ids[0] == logits.argmax().item()


def test_sampled_frequencies_follow_the_softmax() -> None:
    rows, vocabulary = 20_000, 2 * SAMPLER_BLOCK + 9
    logits = 2 * mx.random.normal((vocabulary,), key=key(5, "logits"))
    logits[17] = 6.0
    u = mx.random.uniform(shape=(rows,), key=key(5, "u"))
    tokens, logps = sample(mx.broadcast_to(logits, (rows, vocabulary)) + 0, u, 1.0)
    probabilities = np.array(mx.softmax(logits), dtype=np.float64)
    counts = np.bincount(np.array(tokens), minlength=vocabulary)
    expected = rows * probabilities / probabilities.sum()
    often = expected > 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = often.sum() - 1
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)
    picked = np.log(probabilities)[np.array(tokens)]
    assert np.abs(np.array(logps) - picked).max() < 1e-4


def test_the_extreme_uniform_numbers_never_pick_an_impossible_token() -> None:
    logits = mx.full((2, VOCABULARY), -1e9)
    logits[:, 100] = 1.0
    tokens, _ = sample(logits, mx.array([0.0, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [100, 100]


def test_uniforms_are_those_of_their_own_keys() -> None:
    paths = [("a", 1), ("a", 2), ("b", 1)]
    together = uniforms(3, paths)
    assert together.tolist() == [mx.random.uniform(key=key(3, *p)).item() for p in paths]
    assert len(set(together.tolist())) == 3


def in_two_levels(values: mx.array, axis: int) -> mx.array:
    """A running sum as a GPU makes it: within blocks, then over them. Its rounding is another, and
    it may fall from one block to the next."""
    flat = np.asarray(values, dtype=np.float32)
    parts = np.pad(flat, [(0, 0), (0, -flat.shape[-1] % 32)]).reshape(len(flat), -1, 32)
    within = np.cumsum(parts, axis=-1, dtype=np.float32)
    before = np.cumsum(parts[..., ::-1].sum(axis=-1, dtype=np.float32), axis=-1, dtype=np.float32)
    before = np.concatenate([np.zeros_like(before[:, :1]), before[:, :-1]], axis=-1)
    return mx.array((within + before[..., None]).reshape(len(flat), -1)[:, : flat.shape[-1]])


def test_a_draw_never_lands_on_weight_zero_however_a_scan_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, width = 2000, 300
    weights = mx.random.uniform(shape=(rows, width), key=key(1))
    weights = mx.where(mx.random.uniform(shape=weights.shape, key=key(2)) < 0.7, 0.0, weights)
    monkeypatch.setattr(mx, "cumsum", in_two_levels)
    sums = in_two_levels(weights, -1)
    assert (sums[:, 1:] < sums[:, :-1]).any().item()  # a sum that falls
    places = mx.random.randint(0, width, (rows, 1), key=key(3))
    on_the_edge = mx.take_along_axis(sums, places, axis=-1)[:, 0]
    for target in (on_the_edge, sums[:, -1], 2 * sums[:, -1], mx.zeros(rows)):
        index, rest = _invert(weights, target)
        assert (mx.take_along_axis(weights, index[:, None], axis=-1) > 0).all().item()
        assert (rest >= 0).all().item()
