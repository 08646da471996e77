"""One iteration of GRPO: prompts -> rollout -> reward -> log-probs -> advantage -> update.

Shao et al. 2024, arXiv:2402.03300, with the advantage left unscaled and the KL in the reward.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_grpo.console.output import Console
from mlx_grpo.core.finite import NotFinite, Skip, check_finite
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.data.prompts import batch_indices
from mlx_grpo.distributed.gather import all_groups, all_rewards
from mlx_grpo.grpo.advantages import Shaping, advantages_under, rate
from mlx_grpo.grpo.learner import Learner, sampling, target_at, update_settings
from mlx_grpo.grpo.metrics import (
    Clock,
    iteration_metrics,
    measure,
    processed_tokens,
    skipped_metrics,
)
from mlx_grpo.grpo.rollout import rollout
from mlx_grpo.grpo.state import RunState
from mlx_grpo.grpo.update import reused_groups, update
from mlx_grpo.models.lora import scale_adapter
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.training.agreement import check_adapter


@dataclass(frozen=True)
class Iteration:
    """What an iteration leaves."""

    state: RunState
    metrics: dict[str, Any]
    groups: list[Group]
    raw_PK: list[list[float]]
    skips: list[Skip]


def iterate(
    parts: Learner, state: RunState, ui: Console, safe_point: SafePoint = never_stop
) -> Iteration:
    """One iteration of GRPO; of several ranks each works on its share and learns the whole.

    Raises:
        StopRequested: at a safe point; adapter and optimizer may have moved by then.
    """
    config, roles, ranks, clock = parts.config, parts.roles, parts.ranks, Clock()
    mx.clear_cache()  # shapes change from iteration to iteration; unused buffers would pile up
    step = state.iteration + 1
    indices = batch_indices(config.seed, state.iteration, config.batch_size, len(parts.prompts))
    prompts = [parts.prompts[i] for i in indices]
    target = target_at(config, state.iteration)

    with clock.stage("rollout"), ui.stage(step, "rollout"):
        with merged_for_rollout(roles.backbone, roles.actor.model) as model:
            mine = rollout(
                model,
                roles.backbone.tokenizer,
                roles.backbone.stop_ids,
                prompts,
                sampling(config, config.K, parts.plan),
                config.seed,
                "rollout",
                state.iteration,
                safe_point=safe_point,
                share=ranks.share,
            )
        groups = all_groups(ranks, mine, prompts)
    with clock.stage("reward"), ui.stage(step, "reward"):
        scores = parts.evaluator.rewards(mine, safe_point)
        raw_PK, by_source = all_rewards(ranks, scores, config.K)
    shaping = Shaping(state.controller.penalty, config.scale_advantages)
    settings = update_settings(config, target, parts.plan)
    try:
        check_finite("reward", dict(enumerate(raw_PK)))
        normalizer = state.normalizer.observe([r for row in raw_PK for r in row])
        with clock.stage("logprob"), ui.stage(step, "logprob"), ranks.failing_together():
            rated = rate(
                groups,
                raw_PK,
                roles.reference,
                normalizer,
                config.temperature,
                safe_point,
                ranks.share,
            )
            reused = ranks.own(range(reused_groups(settings))).stop
            first, rest = rated[:reused], rated[reused:]
            later = advantages_under(roles.actor, rest, shaping, config.temperature, safe_point)
        with clock.stage("update"), ui.stage(step, "update"):
            parts.optimizer.learning_rate = state.controller.learning_rate
            scored, stats = update(
                roles.actor, parts.optimizer, first, later, shaping, settings, safe_point, ranks
            )
    except NotFinite as e:  # raised before the first step of the optimizer
        metrics = skipped_metrics(state, groups, e.skip, clock)
        return Iteration(
            state.skipping(processed_tokens(groups)), metrics, groups, raw_PK, [e.skip]
        )
    state = replace(state, normalizer=normalizer)
    measures = measure(mine, scored, ranks)
    controller = state.controller.step(measures.kl, target)
    if controller.decay:
        scale_adapter(roles.actor.model, math.exp(-controller.decay))

    metrics = {
        **iteration_metrics(state, groups, raw_PK, by_source, measures, stats, target),
        "kl/decay": controller.decay,
        **clock.iteration_metrics(
            measures.tokens, stats.tokens, config.num_iterations - state.iteration - 1
        ),
    }
    check_adapter(ranks, roles.actor.model, step)
    state = replace(
        state,
        iteration=state.iteration + 1,
        controller=controller,
        tokens_seen=state.tokens_seen + processed_tokens(groups),
        skipped_in_a_row=state.skipped_in_a_row + 1 if stats.skips else 0,
    )
    return Iteration(state, metrics, groups, raw_PK, stats.skips)
