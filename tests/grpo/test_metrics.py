"""Figures under TRL's names are what TRL computes: its definitions (trl 1.16, grpo_trainer.py)
written out in float64 PyTorch beside ours."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
import torch

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.core.finite import Skip
from mlx_grpo.core.types import Completion, Group, Prompt, TrainingGroup
from mlx_grpo.grpo.advantages import Shaping
from mlx_grpo.grpo.learner import first_state
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Clip, RatioLevel
from mlx_grpo.grpo.metrics import Clock, Measures, iteration_metrics, skipped_metrics
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
    state = replace(first_state(TrainConfig()), tokens_seen=seen)
    measures = Measures(21, 0.1, 0.1, 0.0, 1)
    return iteration_metrics(state, rolled_out(), RAW_PK, {}, measures, stats, 0.05)


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
    state = replace(first_state(TrainConfig()), tokens_seen=5)
    left_out = skipped_metrics(state, rolled_out(), Skip("reward", (0,), (math.nan,)), Clock())
    assert left_out["num_tokens"] == 5 + prompts + answers


def drifted(decoder: Decoder, seed: int, alive: bool) -> TrainingGroup:
    """A group whose old policy was another one, by a little in each token and completion."""
    group = group_of(seed)
    logps = token_logps(decoder, mx.array([group.prompt_ids]), group.tokens_KT, group.mask_KT)
    drift_KT = mx.array([[0.5], [-0.4], [0.05]]) + 0.2 * mx.sin(mx.arange(logps.shape[1]))
    advantages_K = group.advantages_K if alive else mx.zeros(3)
    old_KT = (logps - drift_KT) * group.mask_KT
    return replace(group, old_logp_KT=old_KT, advantages_K=advantages_K)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_clip_ratio_has_all_groups_below_the_line(level: RatioLevel) -> None:
    decoder = Decoder(actor_of("llama"))
    groups = [drifted(decoder, seed, alive=seed != 1) for seed in range(3)]
    settings = UpdateSettings(Clip(0.2, 0.2, level), "sequence", 1.0, 16, 0.5, 3, 1, math.inf)
    expected = trl_clip_ratio(decoder, groups, level)
    stats = update(decoder, new_optimizer(1e-3, 0.0), [], groups, Shaping(0.0), settings)[1]
    assert row(stats)["clip_ratio/region_mean"] == pytest.approx(expected)
    assert 0 < expected < 1


def trl_clip_ratio(decoder: Decoder, groups: list[TrainingGroup], level: str) -> float:
    """`clip_ratio/region_mean` of one batch: `global_masked_mean(is_region_clipped)`."""
    clipped, count = 0.0, 0.0
    for g in groups:
        logps = token_logps(decoder, mx.array([g.prompt_ids]), g.tokens_KT, g.mask_KT)
        mask, advantages = double(g.mask_KT), double(g.advantages_K)[:, None]
        log_ratio = double(logps) - double(g.old_logp_KT)
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None]
        ratio = log_ratio.exp()
        outside = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.2) & (advantages > 0))
        weights = mask if level == "token" else torch.ones_like(ratio)
        clipped += (outside * weights).sum().item()
        count += weights.sum().item()
    return clipped / count
