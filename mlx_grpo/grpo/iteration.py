"""One iteration of GRPO: prompts -> rollout -> reward -> KL -> advantage -> update.

Shao et al. 2024, arXiv:2402.03300, with the advantage left unscaled and the KL held from outside
the loss.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from statistics import pstdev, stdev
from typing import Any

from mlx_grpo.console.output import Console
from mlx_grpo.core.finite import NotFinite, Skip, check_finite
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group, TrainingGroup
from mlx_grpo.distributed.gather import all_groups, all_rewards
from mlx_grpo.grpo.advantages import is_dead, learned_from, rows_that_teach, training_group
from mlx_grpo.grpo.learner import (
    Learner,
    learning_rate_at,
    sampling,
    target_at,
    update_settings,
)
from mlx_grpo.grpo.metrics import (
    Clock,
    iteration_metrics,
    processed_tokens,
    sampled_tokens,
    skipped_metrics,
)
from mlx_grpo.grpo.reference import GroupKL, kl_to_reference, mean_kl, measured_rows
from mlx_grpo.grpo.rollout import rollout
from mlx_grpo.grpo.state import RunState
from mlx_grpo.grpo.update import update
from mlx_grpo.models.lora import scale_adapter
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.rewards.decoupled import decoupled_scores


@dataclass(frozen=True)
class Iteration:
    """What an iteration leaves."""

    state: RunState
    metrics: dict[str, Any]
    groups: list[Group]
    raw_PK: list[list[float]]
    skips: list[Skip]


def iterate(
    learner: Learner, state: RunState, ui: Console, safe_point: SafePoint = never_stop
) -> Iteration:
    """One iteration of GRPO. With several ranks each works on its share and learns the whole.

    Raises:
        StopRequested: at a safe point; adapter and optimizer may have moved by then.
    """
    config, roles, ranks, clock = learner.config, learner.roles, learner.ranks, Clock()
    temperature, target = config.rollout.temperature, target_at(config, state.iteration)
    prompts, k = learner.batch(state), config.rollout.K

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with clock.stage(name), ui.stage(state.iteration + 1, name):
            yield

    with stage("rollout"):
        with merged_for_rollout(roles.backbone, roles.actor.model) as model:
            mine = rollout(
                model,
                roles.backbone.tokenizer,
                roles.backbone.stop_ids,
                prompts,
                sampling(config, k, learner.choice),
                config.run.seed,
                "rollout",
                state.iteration,
                safe_point=safe_point,
                share=ranks.share,
                acting=learner.evaluator.acting,
            )
        groups = all_groups(ranks, mine, prompts)
    with stage("reward"):
        rewards = learner.evaluator.rewards(mine, safe_point)
        raw_PK, by_source = all_rewards(ranks, rewards, k)
    try:
        check_finite("reward", dict(enumerate(raw_PK)))
        normalizer = state.normalizer.observe([r for row in raw_PK for r in row])
        scores_PK = [[normalizer(r) for r in row] for row in raw_PK]
        if config.reward.multi_objective_aggregation == "normalize_then_sum":
            scores_PK = decoupled_scores(by_source, learner.evaluator.rewards.weights, k)
        with stage("logprob"), ranks.failing_together():
            count = config.kl.measured(len(groups) * k)
            measured = measured_rows(config.run.seed, state.iteration, len(groups), k, count)
            kls = kl_to_reference(
                groups, measured, roles.reference, temperature, safe_point, ranks.share
            )
            positions = range(len(groups))[ranks.share]
            k1 = {p: list(kl.k1.values()) for p, kl in zip(positions, kls, strict=True)}
            check_finite("logprob", k1)
        with stage("update"):
            rate = learning_rate_at(config, state)
            learner.optimizer.learning_rate = rate
            training = _advantages(learner, state, groups, scores_PK, kls)
            settings = update_settings(config, target, learner.choice)
            stats = update(roles.actor, learner.optimizer, training, settings, safe_point, ranks)
    except NotFinite as e:  # raised before the first step of the optimizer
        metrics = skipped_metrics(state, groups, e.skip, clock)
        return Iteration(
            state.skipping(processed_tokens(groups)), metrics, groups, raw_PK, [e.skip]
        )
    kl, dead = mean_kl(kls, ranks), sum(ranks.merged([is_dead(g) for g in training]))
    controller = state.controller.step(kl[0], target)
    if controller.decay:
        scale_adapter(roles.actor.model, math.exp(-controller.decay))

    state = replace(
        state, normalizer=normalizer, spreads=state.spreads | _spreads(groups, scores_PK)
    )
    metrics = {
        **iteration_metrics(state, groups, raw_PK, by_source, kl, dead, stats, target),
        "learning_rate": rate,
        "kl/decay": controller.decay,
        **clock.iteration_metrics(sampled_tokens(groups), stats.tokens),
    }
    state = replace(
        state,
        iteration=state.iteration + 1,
        controller=controller,
        tokens_seen=state.tokens_seen + processed_tokens(groups),
        skipped_in_a_row=state.skipped_in_a_row + 1 if stats.skips else 0,
    )
    return Iteration(state, metrics, groups, raw_PK, stats.skips)


def _advantages(
    learner: Learner,
    state: RunState,
    groups: Sequence[Group],
    scores_PK: Sequence[Sequence[float]],
    kls: Sequence[GroupKL],
) -> list[TrainingGroup]:
    """The completions that teach most, of the groups of this rank's share, with advantages."""
    config, beta = learner.config, state.controller.penalty
    scale, batch_std = config.reward.scale_advantages, stdev(chain.from_iterable(scores_PK))
    positions = range(len(groups))[learner.ranks.share]
    training = []
    for position, kl in zip(positions, kls, strict=True):
        scores_K = scores_PK[position]
        rows = rows_that_teach(scores_K, config.optimizer.update_rows)
        shaped = [scores_K[i] - (beta * kl.k1[i] if beta else 0.0) for i in rows]
        group = training_group(position, groups[position], rows, shaped, scale, batch_std)
        if config.optimizer.truncated == "mask":
            ended = [groups[position].completions[i].finish_reason == "stop" for i in rows]
            group = learned_from(group, [i for i, whole in enumerate(ended) if whole])
        training.append(group)
    return training


def _spreads(groups: Sequence[Group], scores_PK: Sequence[Sequence[float]]) -> dict[str, float]:
    """Standard deviation of the scores of each prompt's completions."""
    return {g.prompt.id: pstdev(scores) for g, scores in zip(groups, scores_PK, strict=True)}
