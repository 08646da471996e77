"""Figures of a policy on held-out prompts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.backend.device import device_name
from mlx_grpo.core.padding import completion_arrays
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.grpo.evaluate import (
    Evaluator,
    perplexity,
    reference_answers,
)
from mlx_grpo.grpo.rollout import Sampling
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from mlx_grpo.models.reward_model import load_reward_model
from mlx_grpo.models.stand_ins import fp32_after_blocks
from mlx_grpo.rewards.functions import CustomReward
from mlx_grpo.rewards.mix import RewardMix


def prompt(text: str, response: str | None = None) -> Prompt:
    return Prompt(text, ({"role": "user", "content": text},), tuple(text.encode()), response)


def test_completions_are_padded_on_the_right_and_masked() -> None:
    rows = ((5, 6, 7), (8,))
    answers = tuple(Completion(r, "", "stop", (0.0,) * len(r)) for r in rows)
    tokens_KT, mask_KT = completion_arrays(answers)
    assert mask_KT.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (tokens_KT * mask_KT).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask_KT.dtype == mx.float32


def test_the_reference_model_answers_only_prompts_without_a_response(backbone: Backbone) -> None:
    asked: list[str] = []

    def answer(prompts: Any) -> list[Group]:
        asked.extend(p.id for p in prompts)
        return [Group(p, (Completion((1, 2), "", "stop", (0.0, 0.0)),)) for p in prompts]

    prompts = [prompt("a", "yes"), prompt("b")]
    answers = reference_answers(backbone.tokenizer, prompts, answer)
    assert asked == ["b"]
    stop = backbone.tokenizer.eos_token_id
    assert answers["a"] == (*backbone.tokenizer.encode("yes", add_special_tokens=False), stop)
    assert answers["b"] == (1, 2)


def test_perplexity_weighs_every_token_alike(backbone: Backbone) -> None:
    prompts = [prompt("one"), prompt("two")]
    answers = {"one": (65, 66, 67), "two": (70,)}
    total = 0.0
    for p in prompts:
        ids = [*p.token_ids, *answers[p.id]]
        with fp32_after_blocks(backbone.model):
            logits_TV = backbone.model(mx.array([ids]))[0]
        logp_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
        start = len(p.token_ids) - 1
        total += sum(logp_TV[start + t, i].item() for t, i in enumerate(answers[p.id]))
    found = perplexity(Decoder(backbone.model), prompts, answers)
    assert found == pytest.approx(math.exp(-total / 4), rel=1e-5)


@pytest.fixture
def evaluator(backbone: Backbone) -> Evaluator:
    length = CustomReward("length", lambda given, _: [len(c) for c in given["completion_ids"]])
    return Evaluator(
        backbone=backbone,
        prompts=(prompt("one"), prompt("two")),
        answers={"one": (65, 66), "two": (70,)},
        rewards=RewardMix(None, 1.0, (length,)),
        reference=Decoder(backbone.model),
        sampling=Sampling(k=2, max_tokens=6),
        seed=3,
    )


def test_an_evaluation_is_the_same_every_time_and_its_parts_agree(evaluator: Evaluator) -> None:
    first, second = (evaluator(evaluator.reference) for _ in range(2))
    assert first == second
    completions = [c for g in first.groups for c in g.completions]
    assert len(completions) == len(first.rewards) == 4
    assert first.reward == first.mean_length == sum(len(c.token_ids) for c in completions) / 4
    assert first.metrics()["eval_reward"] == first.reward


def test_the_kl_is_zero_for_the_reference_and_positive_for_another_policy(
    evaluator: Evaluator, backbone: Backbone
) -> None:
    assert evaluator(evaluator.reference).kl == 0.0
    adapted = add_lora(backbone.model, rank=2, scale=2.0, seed=1)
    fresh = evaluator(Decoder(adapted))
    exact = device_name() == "cpu"  # a GPU samples and scores by kernels that round differently
    assert abs(fresh.kl) < (1e-6 if exact else 1e-3)  # a fresh adapter changes nothing
    set_parameters(
        adapted,
        {n: mx.full(v.shape, 0.05) for n, v in lora_parameters(adapted).items() if "_b" in n},
    )
    moved = evaluator(Decoder(adapted))
    assert moved.kl > 1e-3
    assert moved.perplexity != fresh.perplexity


def test_another_seed_draws_other_answers(evaluator: Evaluator) -> None:
    policy = evaluator.reference
    other = replace(evaluator, seed=4)
    assert other(policy).groups != evaluator(policy).groups


def moved(backbone: Backbone) -> Decoder:
    """A policy away from the reference."""
    adapted = add_lora(backbone.model, rank=2, scale=2.0, seed=1)
    drawn = {n: mx.full(v.shape, 0.05) for n, v in lora_parameters(adapted).items() if "_b" in n}
    set_parameters(adapted, drawn)
    return Decoder(adapted)


def test_answers_that_are_shown_are_greedy_and_the_kl_stays_on_samples(
    evaluator: Evaluator, backbone: Backbone
) -> None:
    policy = moved(backbone)
    sampled = evaluator(policy)
    shown = evaluator.shown(policy, sampled, 0.0)
    assert (shown.kl, shown.perplexity) == (sampled.kl, sampled.perplexity)
    assert [len(g.completions) for g in shown.groups] == [1, 1] and shown.temperature == 0
    assert replace(evaluator, seed=4).shown(policy, sampled, 0.0).groups == shown.groups
    assert shown.groups != tuple(Group(g.prompt, g.completions[:1]) for g in sampled.groups)
    assert evaluator.at(policy, 0.0) == shown


def test_at_the_temperature_of_the_samples_nothing_is_answered_twice(
    evaluator: Evaluator, backbone: Backbone
) -> None:
    policy, one_each = moved(backbone), replace(evaluator, sampling=Sampling(k=1, max_tokens=6))
    sampled = one_each(policy)
    assert one_each.shown(policy, sampled, 1.0) is sampled
    assert one_each.at(policy, 1.0) == sampled


def test_an_answer_scores_the_same_whatever_else_is_scored(
    evaluator: Evaluator, backbone: Backbone, reward_model: Path
) -> None:
    """Else two policies that answer alike would win and lose by rounding instead of tying."""
    mix = RewardMix(load_reward_model(reward_model, backbone), 1.0, ())
    asked = tuple(prompt("why " * n) for n in range(1, 8))
    whole = replace(
        evaluator,
        prompts=asked,
        answers={p.id: (65, 66) for p in asked},
        rewards=mix,
        sampling=Sampling(k=1, max_tokens=24),
    )
    together = whole(whole.reference)
    assert len(set(together.rewards)) == len(asked)
    for group, reward in zip(together.groups, together.rewards, strict=True):
        assert mix([group])[0] == [[reward]]
