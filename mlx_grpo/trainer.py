"""The training loop: prompts -> rollout -> reward -> log-probs -> advantage -> update.

`iterate` is the algorithm, one stage after the other; `train` is the run around it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx

from mlx_grpo import log, run_directory
from mlx_grpo.config import TrainConfig, check
from mlx_grpo.console import Console, duration
from mlx_grpo.data import batch_indices
from mlx_grpo.errors import InputError
from mlx_grpo.evaluate import Best
from mlx_grpo.metrics import Clock, iteration_metrics
from mlx_grpo.parts import (
    RunParts,
    first_state,
    load_parts,
    sampling,
    target_at,
    update_settings,
)
from mlx_grpo.rollout import rollout
from mlx_grpo.scoring import Shaping, measure, rate, score_under
from mlx_grpo.state import RunState
from mlx_grpo.types import Group
from mlx_grpo.update import reused_groups, update


def train(config: TrainConfig, ui: Console, resume: bool = False, dry_run: bool = False) -> bool:
    """Run the whole training in `config.run_directory`; False if a signal ended it early.

    Raises:
        InputError: wrong input, or a run directory that is in the way.
    """
    check(config)
    run = config.run_directory
    if not dry_run:
        run_directory.check_vacant(run, resume)
    ui.say(f"mlx-grpo: {config.actor_model}, rewards: {_reward_names(config)}, seed {config.seed}")
    with ui.working("loading"):
        parts = load_parts(config, ui)
    state = first_state(config)
    if dry_run:
        _, metrics, *_ = iterate(parts, state, ui)
        ui.iteration({**metrics, "time/left": 0.0}, 1)
        if metrics["frac_dead_groups"] == 1:
            ui.warn("all answers of each prompt have the same reward: nothing would be learned")
        whole = duration(metrics["time/iteration"] * config.num_iterations)
        ui.say(f"dry run: nothing is kept; {config.num_iterations} iterations like it take {whole}")
        return True
    if resume:
        actor = parts.roles.actor.model
        state, skipped = run_directory.restore(run, config, state, actor, parts.optimizer)
        for reason in skipped:
            ui.warn(f"checkpoint skipped: {reason}")
        ui.say(f"resuming after iteration {state.iteration}")
    finished = False
    try:
        with _stop_signals(ui) as stop_requested:
            finished = _loop(parts, state, run, ui, stop_requested)
    finally:
        if not finished and run_directory.is_run(run):
            ui.warn(f"stopped early; go on with: mlx-grpo train --resume --output {run}")
    return finished


def _loop(
    parts: RunParts, state: RunState, run: Path, ui: Console, stop_requested: list[int]
) -> bool:
    config, actor = parts.config, parts.roles.actor.model
    if state.iteration == 0:
        state = _evaluate(parts, state, run, ui)
    while state.iteration < config.num_iterations and not stop_requested:
        state, metrics, groups, raw_PK = iterate(parts, state, ui)
        log.append(run / log.METRICS, metrics)
        run_directory.log_completions(run, state.iteration, groups, raw_PK)
        ui.iteration(metrics, config.num_iterations)
        last = state.iteration == config.num_iterations
        if last or state.iteration % config.eval_every == 0:
            state = _evaluate(parts, state, run, ui)
        if last or stop_requested or state.iteration % config.checkpoint_every == 0:
            run_directory.save(run, config, state, actor, parts.optimizer)
        if state.skipped_in_a_row >= config.max_skipped_steps:
            raise InputError(
                f"{run}: {state.skipped_in_a_row} iterations in a row met values that are not "
                "finite; start again in another --output with a lower --learning-rate"
            )
    if state.iteration < config.num_iterations:
        return False
    run_directory.save_named_adapter(run, "final", actor)
    if state.best.step is None:
        ui.warn("no evaluation passed the KL gate: there is no best/ adapter, final/ is the last")
    adapters = "final/" if state.best.step is None else "best/ and final/"
    ui.say(f"done: {run} (adapters in {adapters}, figures in {log.METRICS})")
    return True


def iterate(
    parts: RunParts, state: RunState, ui: Console
) -> tuple[RunState, dict[str, Any], list[Group], list[list[float]]]:
    """One iteration of GRPO: (next state, metrics, groups, raw rewards [P][K])."""
    config, roles, clock = parts.config, parts.roles, Clock()
    mx.clear_cache()  # shapes change from iteration to iteration; unused buffers would pile up
    progress = f"iteration {state.iteration + 1}/{config.num_iterations}"
    indices = batch_indices(config.seed, state.iteration, config.batch_size, len(parts.prompts))
    prompts = [parts.prompts[i] for i in indices]
    target = target_at(config, state.iteration)

    with clock.stage("rollout"), ui.working(f"{progress}: rollout"):
        groups = rollout(
            roles.actor.model,
            roles.backbone.tokenizer,
            roles.backbone.stop_ids,
            prompts,
            sampling(config, config.K),
            config.seed,
            "rollout",
            state.iteration,
        )
    with clock.stage("reward"), ui.working(f"{progress}: reward"):
        raw_PK, by_source = parts.evaluator.rewards(groups)
        state = replace(
            state, normalizer=state.normalizer.observe([r for row in raw_PK for r in row])
        )
    shaping = Shaping(state.controller.penalty, config.scale_advantages)
    settings = update_settings(config, target)
    with clock.stage("logprob"), ui.working(f"{progress}: log-probs"):
        rated = rate(groups, raw_PK, roles.reference, state.normalizer, config.temperature)
        first, rest = rated[: reused_groups(settings)], rated[reused_groups(settings) :]
        later = score_under(roles.actor, rest, shaping, config.temperature)
    with clock.stage("update"), ui.working(f"{progress}: update"):
        parts.optimizer.learning_rate = state.controller.learning_rate
        scored, stats = update(roles.actor, parts.optimizer, first, later, shaping, settings)
    measures = measure(groups, scored)

    metrics = {
        **iteration_metrics(state, groups, raw_PK, by_source, measures, stats, target),
        **clock.iteration_metrics(measures.tokens, config.num_iterations - state.iteration - 1),
    }
    state = replace(
        state,
        iteration=state.iteration + 1,
        controller=state.controller.step(measures.kl, target),
        tokens_seen=state.tokens_seen + measures.tokens,
        skipped_in_a_row=state.skipped_in_a_row + 1 if stats.skipped_nonfinite else 0,
    )
    return state, metrics, groups, raw_PK


def _evaluate(parts: RunParts, state: RunState, run: Path, ui: Console) -> RunState:
    """Evaluate on held-out prompts, log, and keep the adapter if it is the best so far."""
    config, roles, step = parts.config, parts.roles, state.iteration
    # before the first update the actor is the reference, so its KL needs no measuring
    policy = roles.actor if step else roles.reference
    clock = Clock()
    with clock.stage("evaluate"), ui.working("evaluating on held-out prompts"):
        evaluation = parts.evaluator(policy, ui.progress)
    if step == 0:  # not before a whole evaluation went well: bad input leaves nothing behind
        run_directory.open_new(run, config)
    target = target_at(config, max(step - 1, 0))
    passed = bool(step) and state.best.passed_by(evaluation, target)
    if passed:
        state = replace(state, best=Best(step, evaluation.perplexity))
        run_directory.save_named_adapter(run, "best", roles.actor.model)
    metrics = {"step": step, **evaluation.metrics(), "eval_best": passed, **clock.metrics()}
    log.append(run / log.METRICS, metrics)
    above = (
        f"KL above its gate of {target:g}" if evaluation.kl >= target else "perplexity not better"
    )
    ui.evaluation(step, metrics, "" if step == 0 else "-> best" if passed else f"({above})")
    return state


def _reward_names(config: TrainConfig) -> str:
    return ", ".join([*([] if config.rm_model == "none" else [config.rm_model]), *config.reward])


@contextmanager
def _stop_signals(ui: Console) -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask for a stop after the running iteration; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        ui.warn("stopping after this iteration, with a checkpoint; again to stop at once")

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
