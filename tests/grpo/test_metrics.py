"""Figures under TRL's names are what TRL computes: its definitions (trl 1.16, grpo_trainer.py)
written out in float64 PyTorch beside ours."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
import torch

from mlx_grpo.config.settings import train_config
from mlx_grpo.core.finite import Skip
from mlx_grpo.core.types import Completion, Group, Prompt, TrainingGroup
from mlx_grpo.grpo.learner import first_state
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Clip, RatioLevel
from mlx_grpo.grpo.metrics import Clock, iteration_metrics, skipped_metrics
from mlx_grpo.grpo.update import UpdateSettings, UpdateStats, update
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.optimizer import new_optimizer
from tests.helpers.groups import actor_of, group_of
from tests.helpers.torch_reference import double

RAW_PK = [[1.0, 1.0, 1.0], [0.0, 4.0, -2.0]]


def rolled_out() -> list[Group]:
    """Two prompts of 2 and 5 tokens with answers of 1 to 6."""
    return [
        Group(
            Prompt(str(i), ({"role": "user", "content": "x"},), tuple(range(length))),
            tuple(Completion((7,) * (n + 3 * i), "x", "stop", ()) for n in (1, 2, 3)),
        )
        for i, length in enumerate((2, 5))
    ]


def row(stats: UpdateStats, seen: int = 0) -> dict[str, Any]:
    state = replace(first_state(train_config()), tokens_seen=seen)
    return iteration_metrics(state, rolled_out(), RAW_PK, {}, (0.1, 0.1), 1, stats, 0.05)


def test_the_deviation_of_the_reward_is_over_all_completions() -> None:
    rewards = torch.tensor(RAW_PK, dtype=torch.float64)
    found = row(UpdateStats())
    assert found["reward_std"] == pytest.approx(rewards.flatten().std(correction=1).item())
    assert found["reward_std_within_groups"] == pytest.approx(
        rewards.std(dim=1, correction=1).mean().item()
    )
    assert found["frac_reward_zero_std"] == 0.5


def test_tokens_count_the_prompt_of_each_completion() -> None:
    prompts, answers = 3 * 2 + 3 * 5, 1 + 2 + 3 + 4 + 5 + 6
    assert row(UpdateStats(), seen=1000)["num_tokens"] == 1000 + prompts + answers
    state = replace(first_state(train_config()), tokens_seen=5)
    left_out = skipped_metrics(state, rolled_out(), Skip("reward", (0,), (math.nan,)), Clock())
    assert left_out["num_tokens"] == 5 + prompts + answers


def group(seed: int) -> TrainingGroup:
    """The second of three groups has no preference."""
    found = group_of(seed)
    return replace(found, advantages_K=mx.zeros(3)) if seed == 1 else found


def trained(groups: list[TrainingGroup], level: RatioLevel, epochs: int) -> Any:
    """(decoder, stats) after a step per epoch, each over all groups, at a high learning rate."""
    decoder = Decoder(actor_of("llama"))
    settings = UpdateSettings(Clip(0.2, 0.2, level), "sequence", 1.0, 16, 0.5, 3, epochs, math.inf)
    return decoder, update(decoder, new_optimizer(0.05, 0.0), groups, settings)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_clip_ratio_has_all_groups_below_the_line(level: RatioLevel) -> None:
    groups = [group(seed) for seed in range(3)]
    start = Decoder(actor_of("llama"))
    old = [token_logps(start, mx.array([g.prompt_ids]), g.tokens_KT, g.mask_KT) for g in groups]
    after_one = trained(groups, level, 1)[0]
    expected = trl_clip_ratio(after_one, groups, old, level)
    stats = trained(groups, level, 2)[1]
    # nothing is clipped in the first epoch, where all ratios are one
    assert row(stats)["clip_ratio/region_mean"] == pytest.approx(expected / 2)
    assert 0 < expected < 1


def trl_clip_ratio(
    decoder: Decoder, groups: list[TrainingGroup], old: list[mx.array], level: str
) -> float:
    """`clip_ratio/region_mean` of one batch: `global_masked_mean(is_region_clipped)`."""
    clipped, count = 0.0, 0.0
    for g, old_KT in zip(groups, old, strict=True):
        logps = token_logps(decoder, mx.array([g.prompt_ids]), g.tokens_KT, g.mask_KT)
        mask, advantages = double(g.mask_KT), double(g.advantages_K)[:, None]
        log_ratio = double(logps) - double(old_KT)
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None]
        ratio = log_ratio.exp()
        outside = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.2) & (advantages > 0))
        weights = mask if level == "token" else torch.ones_like(ratio)
        clipped += (outside * weights).sum().item()
        count += weights.sum().item()
    return clipped / count
