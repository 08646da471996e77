"""Load what a run works with: weights, rewards, prompts, the learner."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.backend.device import limit_memory
from mlx_grpo.backend.precision import Precision
from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.prompts import PromptRow, read_prompts
from mlx_grpo.data.template import Template
from mlx_grpo.data.tools import tools_for
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.files.manifest import sha256
from mlx_grpo.grpo.evaluate import Evaluator
from mlx_grpo.grpo.learner import Learner, sampling
from mlx_grpo.grpo.turns import Acting
from mlx_grpo.models.backbone import Backbone, largest_state, load_backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.directory import check_length
from mlx_grpo.models.optimizer import new_optimizer
from mlx_grpo.models.reward_model import RewardModel, load_reward_model
from mlx_grpo.models.roles import Roles, new_actor
from mlx_grpo.models.streamed_reward_model import StreamedRewardModel, open_streamed
from mlx_grpo.plan.memory import STREAMED_HIDDEN, Plan
from mlx_grpo.plan.planner import Planner, asked_in, planner_for, precision_of
from mlx_grpo.plan.tables import check_fits
from mlx_grpo.rewards.environments import Environments
from mlx_grpo.rewards.functions import (
    PYTHON,
    CustomReward,
    UserFunction,
    environment_reward,
    given_reward,
    load_reward,
)
from mlx_grpo.rewards.mix import RewardMix
from mlx_grpo.rewards.overlong import NAME as OVERLONG
from mlx_grpo.rewards.overlong import soft_overlong_punishment
from mlx_grpo.run.provenance import input_digests, recorded
from mlx_grpo.training.held_out import asking, read_tests, tokenized, warn_of_leaks

SAFE_IN_FP16 = 65504 / 4
"""Room for what other texts and a LoRA make of the largest state of one text."""
RESERVED = frozenset({"reward", "reward_model", "judge", OVERLONG})
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
    sizes, date = plan.choice.sizes, config.model.template_date
    backbone = load_policy(config, precision_of(config, plan))
    precision = backbone.precision
    if config.reward.model == "none":
        return FrozenModels(backbone, None)
    path = Path(config.reward.model)
    if plan.choice.swap:
        held = STREAMED_HIDDEN
        return FrozenModels(backbone, open_streamed(path, precision, sizes, held, date))
    reward_model = load_reward_model(path, backbone, sizes, precision, date)
    return FrozenModels(backbone, reward_model)


def load_policy(config: TrainConfig, precision: Precision) -> Backbone:
    """The SFT model; in bf16 where it was not asked for in fp16 and would leave fp16's range."""
    path, template = Path(config.model.actor), template_of(config)
    backbone = load_backbone(path, precision, template)
    if precision.dtype != mx.float16 or (most := largest_state(backbone)) < SAFE_IN_FP16:
        return backbone
    told = f"{path}: a state between its blocks reaches {most:.0f} of the 65504 that fp16 holds"
    if asked_in(config).dtype == "fp16":
        return replace(backbone, note=f"{told}; --precision bf16 has room")
    del backbone  # not both at once
    backbone = load_backbone(path, replace(precision, dtype=mx.bfloat16), template)
    return replace(backbone, note=f"{told}, so it computes in bf16")


def template_of(config: TrainConfig) -> Template:
    """What a run changes about the SFT model's chat template."""
    model = config.model
    return Template(model.template_date, model.chat_template, model.chat_template_kwargs)


class SharedModels:
    """`load_models` for several runs in turn: what the last one has loaded serves the next, where
    models and plan are the same."""

    def __init__(self) -> None:
        self._of: tuple[str, str, Template, Plan] | None = None
        self._weights: FrozenModels | None = None

    def __call__(self, config: TrainConfig, plan: Plan) -> FrozenModels:
        wanted = (config.model.actor, config.reward.model, template_of(config), plan)
        if self._weights is None or self._of != wanted:
            self._weights = None  # not both at once
            self._of, self._weights = wanted, load_models(config, plan)
        return self._weights


def load_learner(
    config: TrainConfig,
    ui: Console,
    load: LoadModels = load_models,
    ranks: Ranks = ALONE,
    functions: Mapping[str, UserFunction] | None = None,
) -> Learner:
    """Build everything a run needs.

    Args:
        load: gets the weights; not before everything else has been found good.
        ranks: those that share the work.
        functions: reward functions that were given as Python objects, by name.

    Raises:
        InputError: any of the inputs is missing or wrong.
    """
    planner = planner_for(config, ranks=ranks.size)
    plan = planner.plan()
    check_fits(planner, plan, ui)
    rows = training_rows(config)  # before the weights: a bad row is found at once
    test_rows = read_tests(config, rows, ui)
    evaluator = load_evaluator(config, ui, load, planner, functions, lambda: rows)
    with _closed_on_failure(evaluator.rewards):
        if not evaluator.rewards.weights:
            raise InputError(
                "no reward counts, so nothing would be learned; give --rm-model or --reward a "
                "weight other than 0, or the class of --environment a method 'reward'"
            )
        backbone = evaluator.backbone
        limit = config.data.max_prompt_length
        prompts = tokenized(config.data.prompts, rows, backbone, limit, ui, evaluator.acting)
        actor = new_actor(
            backbone,
            config.model.lora_rank,
            config.model.lora_scale,
            config.run.seed,
            plan.choice.sizes,
            config.model.lora_layers,
            config.model.expert_lora_rank,
            config.model.lora_target_modules,
        )
        roles = Roles(backbone, actor, evaluator.reference)
        optimizer = new_optimizer(config.optimizer.learning_rate, config.optimizer.weight_decay)
        files = config.evaluation.test_names
        tests = {
            name: asking(evaluator, planner, files[name], found, ui)
            for name, found in test_rows.items()
        }
        return Learner(config, plan.choice, roles, prompts, evaluator, optimizer, ranks, tests)


def load_evaluator(
    config: TrainConfig,
    ui: Console,
    load: LoadModels = load_models,
    planner: Planner | None = None,
    functions: Mapping[str, UserFunction] | None = None,
    trained: Callable[[], Sequence[PromptRow]] | None = None,
    skip: int = 0,
) -> Evaluator:
    """Load backbone, rewards and held-out prompts: all that an evaluation needs but a policy.

    Args:
        functions: reward functions that were given as Python objects, by name.
        trained: gets the rows of the training prompts; None: as `config` names them.
        skip: first held-out prompts to leave out, unless no others are there.

    Raises:
        InputError: any of the inputs is missing or wrong.
    """
    rewards = _rewards(config, functions or {}, ui)
    with _closed_on_failure(rewards):
        system = config.data.system_prompt
        rows = read_prompts(Path(config.evaluation.prompts), config.columns, system)
        warn_of_leaks(config, trained or partial(training_rows, config), rows, ui)
        planner = planner or planner_for(config)
        plan = planner.plan()
        weights = load(config, plan)
        backbone = weights.backbone
        if backbone.note:
            ui.warn(backbone.note)
        longest = config.data.max_prompt_length + config.rollout.max_completion_length
        check_length(backbone.path, backbone.config, longest)
        acting = None
        if environments := rewards.environments:
            tools = tools_for(backbone.tokenizer, environments.tools)
            acting = Acting(environments, tools, config.rollout.max_tool_calling_iterations)
        evaluator = Evaluator(
            backbone=backbone,
            reference=Decoder(backbone.model, plan.choice.sizes),
            prompts=(),
            answers={},
            rewards=replace(rewards, model=weights.reward_model),
            sampling=sampling(config, 1, plan.choice),
            seed=config.run.seed,
            acting=acting,
        )
        return asking(evaluator, planner, config.evaluation.prompts, rows, ui, skip)


@contextmanager
def _closed_on_failure(rewards: RewardMix) -> Iterator[None]:
    """Leave no process behind where loading fails: a notebook would gather them."""
    try:
        yield
    except BaseException:
        rewards.close()
        raise


def _rewards(config: TrainConfig, functions: Mapping[str, UserFunction], ui: Console) -> RewardMix:
    """All but the reward model; what runs in a process of its own is started."""
    rewards = RewardMix(None, config.reward.model_weight, ())
    for make in _custom_rewards(config, functions, ui):
        with _closed_on_failure(rewards):
            rewards = replace(rewards, custom=(*rewards.custom, make()))
    if not config.rollout.environment:
        return rewards
    with _closed_on_failure(rewards):
        environment, timeout = config.rollout.environment, config.rollout.tool_timeout
        environments = Environments(environment, timeout, ui.relay)
    own = (environment_reward(environments),) if environments.rewards else ()
    return replace(rewards, custom=(*own, *rewards.custom), environments=environments)


def _custom_rewards(
    config: TrainConfig, functions: Mapping[str, UserFunction], ui: Console
) -> list[Callable[[], CustomReward]]:
    """What makes each of them."""
    weights = config.reward.weights or (1.0,) * len(config.reward.functions)
    weighted = [
        *zip(config.reward.functions, weights, strict=True),
        *((s, 0.0) for s in config.evaluation.rewards),
    ]
    names = [spec.rpartition(":")[2] for spec, _ in weighted]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--reward: two functions are named '{twice.pop()}'; rename one")
    if taken := RESERVED.intersection(names):
        raise InputError(f"--reward: the name '{min(taken)}' is taken; rename the function")
    custom: list[Callable[[], CustomReward]] = [
        partial(given_reward, spec, weight, functions)
        if spec.startswith(PYTHON)
        else partial(load_reward, spec, weight, config.reward.timeout, ui.relay)
        for spec, weight in weighted
    ]
    limit, cache = config.rollout.max_completion_length, config.reward.soft_punish_cache
    return [*custom, partial(soft_overlong_punishment, limit, cache)] if cache else custom


def without_given(config: TrainConfig) -> TrainConfig:
    """The settings without the reward functions that were given as Python objects."""
    specs = config.reward.functions
    weights = config.reward.weights or (1.0,) * len(specs)
    kept = [
        (spec, weight)
        for spec, weight in zip(specs, weights, strict=True)
        if not spec.startswith(PYTHON)
    ]
    return with_settings(
        config, reward=tuple(s for s, _ in kept), reward_weights=tuple(w for _, w in kept)
    )


def training_rows(config: TrainConfig) -> list[PromptRow]:
    """The rows of the training prompts, by the run's own column."""
    columns = {"prompt": config.data.prompt_column}
    return read_prompts(Path(config.data.prompts), columns, config.data.system_prompt)


def provenance_of(learner: Learner) -> dict[str, Any]:
    """What the run's numbers come from, see `provenance.recorded`."""
    digests = input_digests(learner.config, learner.evaluator.rewards.custom)
    environments = learner.evaluator.rewards.environments
    if environments and environments.file:
        digests["--environment"] = sha256(Path(environments.file))
    held = str(learner.roles.backbone.precision)
    return recorded(learner.config, digests, held, learner.ranks.size)
