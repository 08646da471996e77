"""Load what a run works with: weights, rewards, prompts, the learner."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.backend.device import limit_memory
from mlx_grpo.backend.precision import precision_for
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Group, Prompt
from mlx_grpo.data.leaks import leak_warnings
from mlx_grpo.data.prompts import PromptRow, read_prompts, tokenize_prompts
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.evaluate import Evaluator, reference_answers, writing
from mlx_grpo.grpo.learner import Learner, sampling
from mlx_grpo.grpo.rollout import rollout
from mlx_grpo.grpo.state import RunState
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.optimizer import new_optimizer
from mlx_grpo.models.reward_model import RewardModel, load_reward_model
from mlx_grpo.models.roles import Roles, new_actor
from mlx_grpo.models.streamed_reward_model import StreamedRewardModel, open_streamed
from mlx_grpo.plan.memory import STREAMED_HIDDEN, Plan
from mlx_grpo.plan.planner import planner
from mlx_grpo.plan.tables import check_fits
from mlx_grpo.rewards.functions import CustomReward, load_reward
from mlx_grpo.rewards.mix import RewardMix
from mlx_grpo.run import log
from mlx_grpo.run.provenance import input_digests, recorded

RESERVED = frozenset({"reward", "reward_model", "judge"})
"""Names under which figures have scores that are no custom function's."""


@dataclass(frozen=True)
class FrozenModels:
    """What no run changes, so that several can share it."""

    backbone: Backbone
    reward_model: RewardModel | StreamedRewardModel | None


LoadModels = Callable[[TrainConfig, Plan], FrozenModels]


def load_models(config: TrainConfig, plan: Plan) -> FrozenModels:
    """Load the SFT model and the reward model, within the limits of the plan.

    Raises:
        InputError: one is missing or wrong.
    """
    limit_memory(plan.limit, plan.weights + plan.reward_model + plan.adapter)
    precision, sizes = precision_for(plan.choice.dense), plan.choice.sizes
    backbone = load_backbone(Path(config.actor_model), precision)
    if config.rm_model == "none":
        return FrozenModels(backbone, None)
    path = Path(config.rm_model)
    if plan.choice.swap:
        return FrozenModels(backbone, open_streamed(path, precision, sizes, STREAMED_HIDDEN))
    return FrozenModels(backbone, load_reward_model(path, backbone, sizes, precision))


class SharedModels:
    """`load_models` for several runs in turn: what the last one has loaded serves the next, where
    models and plan are the same."""

    def __init__(self) -> None:
        self._of: tuple[str, str, Plan] | None = None
        self._weights: FrozenModels | None = None

    def __call__(self, config: TrainConfig, plan: Plan) -> FrozenModels:
        wanted = (config.actor_model, config.rm_model, plan)
        if self._weights is None or self._of != wanted:
            self._weights = None  # not both at once
            self._of, self._weights = wanted, load_models(config, plan)
        return self._weights


def load_parts(
    config: TrainConfig, ui: Console, load: LoadModels = load_models, ranks: Ranks = ALONE
) -> Learner:
    """Build everything a run needs.

    Args:
        load: gets the weights; not before everything else has been found good.
        ranks: those that share the work.

    Raises:
        InputError: any of the inputs is missing or wrong.
    """
    planned = planner(config, ranks=ranks.size)
    plan = planned.plan()
    check_fits(planned, plan, ui)
    rows = read_prompts(Path(config.prompts))  # before the weights: a bad row is found at once
    evaluator = load_evaluator(config, ui, load, plan, trained=rows)
    backbone = evaluator.backbone
    prompts = _prompts(config.prompts, rows, backbone, config.max_prompt_length, ui)
    actor = new_actor(backbone, config.lora_rank, config.lora_scale, config.seed, plan.choice.sizes)
    roles = Roles(backbone, actor, evaluator.reference)
    optimizer = new_optimizer(config.learning_rate, config.weight_decay)
    return Learner(config, plan, roles, prompts, evaluator, optimizer, ranks)


def load_evaluator(
    config: TrainConfig,
    ui: Console,
    load: LoadModels = load_models,
    plan: Plan | None = None,
    trained: Sequence[PromptRow] | None = None,
) -> Evaluator:
    """Load backbone, rewards and held-out prompts: all that an evaluation needs but a policy.

    Args:
        trained: the rows of `config.prompts`, where they have been read.

    Raises:
        InputError: any of the inputs is missing or wrong.
    """
    custom, rows = _custom_rewards(config), read_prompts(Path(config.eval_prompts))
    _warn_of_leaks(config, trained, rows, ui)
    plan = plan or planner(config).plan()
    weights = load(config, plan)
    backbone = weights.backbone
    held_out = _prompts(config.eval_prompts, rows, backbone, config.max_prompt_length, ui)
    one_each = sampling(config, 1, plan)

    def ask(missing: Sequence[Prompt]) -> list[Group]:
        model, tokenizer, stop_ids = backbone.model, backbone.tokenizer, backbone.stop_ids
        told, key = writing("reference answers", one_each, ui.progress), (config.seed, "references")
        return rollout(model, tokenizer, stop_ids, missing, one_each, *key, on_token=told)

    prompts = held_out[: config.eval_limit or None]
    return Evaluator(
        backbone=backbone,
        reference=Decoder(backbone.model, plan.choice.sizes),
        prompts=tuple(prompts),
        answers=reference_answers(backbone.tokenizer, prompts, ask),
        rewards=RewardMix(weights.reward_model, config.rm_weight, custom),
        sampling=one_each,
        seed=config.seed,
    )


def _custom_rewards(config: TrainConfig) -> tuple[CustomReward, ...]:
    weights = config.reward_weights or (1.0,) * len(config.reward)
    weighted = [*zip(config.reward, weights, strict=True), *((s, 0.0) for s in config.eval_reward)]
    names = [spec.rpartition(":")[2] for spec, _ in weighted]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--reward: two functions are named '{twice.pop()}'; rename one")
    if taken := RESERVED.intersection(names):
        raise InputError(f"--reward: the name '{min(taken)}' is taken; rename the function")
    return tuple(load_reward(spec, weight, config.reward_timeout) for spec, weight in weighted)


def _warn_of_leaks(
    config: TrainConfig,
    trained: Sequence[PromptRow] | None,
    held_out: Sequence[PromptRow],
    ui: Console,
) -> None:
    try:
        trained = read_prompts(Path(config.prompts)) if trained is None else trained
    except InputError as e:  # an evaluation can do without them
        ui.warn(f"cannot check whether held-out prompts were trained on: {e}")
        return
    for warning in leak_warnings(config.prompts, trained, config.eval_prompts, held_out):
        ui.warn(warning)


def _prompts(
    file: str, rows: Sequence[PromptRow], backbone: Backbone, limit: int, ui: Console
) -> list[Prompt]:
    prompts, too_long = tokenize_prompts(
        Path(file),
        rows,
        backbone.tokenizer,
        limit,
        functools.partial(ui.progress, f"tokenizing {file}"),
    )
    if too_long:
        ui.warn(f"{file}: {too_long} prompts longer than {limit} tokens are skipped")
    return prompts


def evaluation_due(state: RunState, config: TrainConfig) -> bool:
    """Whether an evaluation comes before the next iteration."""
    last = state.iteration == config.num_iterations
    return state.evaluated < state.iteration and (last or state.iteration % config.eval_every == 0)


def check_skips(state: RunState, config: TrainConfig) -> None:
    """Refuse to go on after too many iterations that taught nothing.

    Raises:
        InputError: with what to look at.
    """
    if state.skipped_in_a_row >= config.max_skipped_steps:
        run = config.run_directory
        raise InputError(
            f"{run}: {state.skipped_in_a_row} iterations in a row met values that are not finite "
            f"(see {run / log.SKIPPED}); check the reward, or resume with a lower --learning-rate "
            "and --allow-config-change"
        )


def provenance_of(parts: Learner) -> dict[str, Any]:
    """What the run's numbers come from, see `provenance.recorded`."""
    digests = input_digests(parts.config, parts.evaluator.rewards.custom)
    return recorded(parts.config, digests, parts.plan.choice.dense, parts.ranks.size)
