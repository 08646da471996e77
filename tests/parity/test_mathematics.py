"""The fp32 mathematics agrees with the textbook in float64 PyTorch to 1e-5 relative."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_grpo.grpo.advantages import AdvantageScale, group_advantages
from mlx_grpo.grpo.kl_estimators import kl_k1, kl_k3_sum
from mlx_grpo.grpo.loss import (
    Aggregation,
    Clip,
    RatioLevel,
    clipped_count,
    clipped_surrogate,
    token_weights,
)
from mlx_grpo.reward_modeling.train import bradley_terry_loss
from mlx_grpo.rewards.normalizer import ScoreNormalizer
from tests.helpers import torch_reference as reference
from tests.helpers.torch_reference import BOUND, double, relative_difference, report

LENGTHS = [[9, 1, 4, 7], [2, 12, 5, 3]]  # two groups of four completions, ragged
MAX_TOKENS = 16


@dataclass(frozen=True)
class Group:
    """fp32 numbers of one group; padding holds garbage that must not count."""

    lengths: list[int]
    logp_KT: np.ndarray
    old_logp_KT: np.ndarray
    advantages_K: np.ndarray

    @property
    def mask_KT(self) -> mx.array:
        columns = mx.arange(self.logp_KT.shape[1])
        return (columns[None] < mx.array(self.lengths)[:, None]).astype(mx.float32)


def groups() -> list[Group]:
    rng = np.random.default_rng(7)
    made = []
    for lengths in LENGTHS:
        shape = (len(lengths), max(lengths))
        old = -rng.exponential(2.0, shape)
        # a drift per completion, so that sequence-level ratios are clipped too
        new = old + rng.normal(0, 0.25, shape) + rng.normal(0, 0.5, (len(lengths), 1))
        advantages = rng.normal(0, 1, len(lengths))
        made.append(Group(lengths, *(a.astype(np.float32) for a in (new, old, advantages))))
    return made


@pytest.mark.parametrize("scale", ["none", "std"])
def test_group_advantages(scale: AdvantageScale) -> None:
    rewards_PK = np.random.default_rng(1).normal(3, 2, (5, 6)).astype(np.float32)
    found_PK = group_advantages(mx.array(rewards_PK), scale)
    expected_PK = reference.group_advantages(double(rewards_PK), scale)
    assert report(f"advantages ({scale})", relative_difference(found_PK, expected_PK)) <= BOUND


def test_score_normaliser_over_several_batches() -> None:
    rng = np.random.default_rng(2)
    batches = [rng.normal(4 + 3 * i, 1 + i, 24) for i in range(4)]
    normalizer, found = ScoreNormalizer(alpha=0.8, limit=2.0), []
    for batch in batches:
        normalizer = normalizer.observe(batch.tolist())
        found.append([normalizer(s) for s in batch.tolist()])
    expected = reference.normalized([double(b) for b in batches], 0.8, 2.0)
    assert sum(abs(z) == 2.0 for row in found for z in row) > 3  # the clip is at work
    differences = [relative_difference(f, e) for f, e in zip(found, expected, strict=True)]
    assert report("score normaliser", *differences) <= BOUND


@pytest.mark.parametrize("high", [0.2, 0.28])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_clipped_surrogate_and_its_gradient(
    aggregation: Aggregation, level: RatioLevel, high: float
) -> None:
    """One minibatch of two groups: MLX sums group by group, the reference sees all completions."""
    clip = Clip(0.2, high, level)
    minibatch = groups()
    tokens, completions = sum(map(sum, LENGTHS)), sum(map(len, LENGTHS))
    loss, clipped, gradients = 0.0, 0.0, []
    for g in minibatch:
        weights_KT = token_weights(g.mask_KT, aggregation, completions, tokens, MAX_TOKENS)
        logp_KT, fixed = (
            mx.array(g.logp_KT),
            (mx.array(g.old_logp_KT), mx.array(g.advantages_K), g.mask_KT),
        )
        value, gradient_KT = mx.value_and_grad(clipped_surrogate)(logp_KT, *fixed, weights_KT, clip)
        loss += value.item()
        gradients.append(gradient_KT)
        clipped += clipped_count(logp_KT, *fixed, clip).item()
    assert 0 < clipped < tokens  # both branches of the minimum are at work

    leaves = [double(g.logp_KT).requires_grad_() for g in minibatch]
    rows = [
        (leaf[i, :n], double(g.old_logp_KT)[i, :n], double(g.advantages_K)[i])
        for leaf, g in zip(leaves, minibatch, strict=True)
        for i, n in enumerate(g.lengths)
    ]
    expected = reference.clipped_surrogate(rows, 0.2, high, level, aggregation, MAX_TOKENS)
    expected.backward()
    differences = [relative_difference(loss, expected)] + [
        relative_difference(gradient_KT, leaf.grad)
        for gradient_KT, leaf in zip(gradients, leaves, strict=True)
    ]
    what = f"clipped surrogate, value and gradient ({aggregation}, {level} ratio, high {high})"
    assert report(what, *differences) <= BOUND


def test_kl_k1_of_each_completion() -> None:
    differences = []
    for g in groups():
        found_K = kl_k1(mx.array(g.logp_KT), mx.array(g.old_logp_KT), g.mask_KT)
        new, old = double(g.logp_KT), double(g.old_logp_KT)
        expected_K = torch.stack(
            [reference.kl_k1(new[i, :n], old[i, :n]) for i, n in enumerate(g.lengths)]
        )
        differences.append(relative_difference(found_K, expected_K))
    assert report("KL k1", *differences) <= BOUND


@pytest.mark.parametrize("distance", [1.0, 0.03])
def test_kl_k3_also_of_policies_that_are_close(distance: float) -> None:
    differences = []
    for g in groups():
        ref_KT = (g.logp_KT + distance * (g.old_logp_KT - g.logp_KT)).astype(np.float32)
        found = kl_k3_sum(mx.array(g.logp_KT), mx.array(ref_KT), g.mask_KT).item()
        new, ref = double(g.logp_KT), double(ref_KT)
        expected = sum(reference.kl_k3_sum(new[i, :n], ref[i, :n]) for i, n in enumerate(g.lengths))
        differences.append(relative_difference(found, torch.as_tensor(expected)))
    assert report(f"KL k3 (distance {distance})", *differences) <= BOUND


def test_bradley_terry_loss_and_its_gradient() -> None:
    scores_K = np.random.default_rng(5).normal(0, 3, 6).astype(np.float32)
    pairs = [(0, 1), (0, 2), (3, 1), (5, 4), (2, 5)]
    value, gradient_K = mx.value_and_grad(lambda s: bradley_terry_loss(s, pairs))(
        mx.array(scores_K)
    )
    leaf_K = double(scores_K).requires_grad_()
    expected = reference.bradley_terry(leaf_K, pairs)
    expected.backward()
    value_difference = relative_difference(value.item(), expected)
    gradient_difference = relative_difference(gradient_K, leaf_K.grad)
    assert report("Bradley-Terry, value and gradient", value_difference, gradient_difference) <= (
        BOUND
    )
