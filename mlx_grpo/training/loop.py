"""A run: load, iterate, evaluate, save; stop and go on. The algorithm is `iteration.py`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_grpo.config.checks import check
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.console.live import duration
from mlx_grpo.console.output import Console
from mlx_grpo.core.stopping import SafePoint, StopRequested, stop_signals
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.files.lock import locked
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.grpo.learner import Learner, first_state, policy_at, target_at
from mlx_grpo.grpo.metrics import Clock
from mlx_grpo.grpo.state import Best, RunState
from mlx_grpo.report.health import new_findings
from mlx_grpo.report.write import try_report
from mlx_grpo.run import directory as run_directory
from mlx_grpo.run import log
from mlx_grpo.run.directory import REPORT, Snapshot
from mlx_grpo.training.agreement import check_inputs, share_state
from mlx_grpo.training.estimate import guessed_pace, measured_pace, say_how_long
from mlx_grpo.training.follow import follow
from mlx_grpo.training.setup import (
    LoadModels,
    check_skips,
    evaluation_due,
    load_models,
    load_parts,
    provenance_of,
)
from mlx_grpo.training.trackers import Tracker, check_installed, open_trackers

GO_ON = "stopped early; go on with: mlx-grpo train --resume --output {run}"


def train(
    config: TrainConfig,
    ui: Console,
    resume: bool = False,
    dry_run: bool = False,
    allow_change: bool = False,
    load: LoadModels = load_models,
    ranks: Ranks = ALONE,
) -> bool:
    """Run the whole training in `config.run_directory`; False if a signal ended it early.

    Of several ranks the first writes the run, the others follow.

    Args:
        allow_change: resume although settings or inputs that shape the numbers have changed.
        load: gets the weights; several runs may share them.
        ranks: those that share the work.

    Raises:
        InputError: wrong input, or a run directory that is in the way.
    """
    check(config)
    if ranks.leads:
        check_installed(config.log)
    if dry_run:
        with _loaded(config, ui, load, ranks) as parts:
            _dry_run(parts, ui)
        return True
    if not ranks.leads:
        with _loaded(config, ui, load, ranks) as parts:
            return follow(parts, ui)
    run = config.run_directory
    with locked(run):
        run_directory.check_vacant(run, resume)
        with _loaded(config, ui, load, ranks) as parts:
            return _run(parts, run, ui, resume, allow_change)


@contextmanager
def _loaded(config: TrainConfig, ui: Console, load: LoadModels, ranks: Ranks) -> Iterator[Learner]:
    names = [*([] if config.rm_model == "none" else [config.rm_model]), *config.reward]
    ui.say(f"mlx-grpo: {config.actor_model}, rewards: {', '.join(names)}, seed {config.seed}")
    with ui.working("loading"):
        parts = load_parts(config, ui, load, ranks)
    try:
        yield parts
    finally:
        parts.evaluator.rewards.close()


def _dry_run(parts: Learner, ui: Console) -> None:
    config = parts.config
    done = iterate(parts, first_state(config), ui)
    if done.skips and "kl" not in done.metrics:
        ui.warn(f"the {done.skips[0].stage} is not finite: nothing would be learned")
        return
    ui.iteration({**done.metrics, "time/left": 0.0}, 1)
    if done.metrics["frac_dead_groups"] == 1:
        ui.warn("all answers of each prompt have the same reward: nothing would be learned")
    whole = duration(done.metrics["time/iteration"] * config.num_iterations)
    ui.say(
        f"dry run: nothing is kept; {config.num_iterations} iterations like it take {whole}, "
        "evaluations not counted"
    )


def _run(parts: Learner, run: Path, ui: Console, resume: bool, allow_change: bool) -> bool:
    config, actor = parts.config, parts.roles.actor.model
    about, state = provenance_of(parts), first_state(config)
    check_inputs(parts.ranks, about)
    run_directory.check_space(run, config, actor)
    with _telling_how_to_go_on(run, ui, (OSError,)):
        if resume:
            state, warnings = run_directory.restore(
                run, config, state, actor, parts.optimizer, about, allow_change
            )
            for warning in warnings:
                ui.warn(warning)
            ui.say(f"resuming after iteration {state.iteration}")
            rows = log.read(run / log.METRICS) if state.iteration else []
            if pace := measured_pace(rows):
                say_how_long(ui, config, pace, state.iteration, "as it went before")
    state = share_state(parts.ranks, state, actor, parts.optimizer)
    with (
        _telling_how_to_go_on(run, ui, (BaseException,)),
        ui.training(config.num_iterations),
        open_trackers(config, run, state.iteration, ui.warn) as tracker,
        stop_signals() as safe_point,
    ):
        safe_point = parts.ranks.watching(safe_point)
        return _loop(parts, state, run, ui, about, tracker, safe_point)


@contextmanager
def _telling_how_to_go_on(
    run: Path, ui: Console, failures: tuple[type[BaseException], ...]
) -> Iterator[None]:
    try:
        yield
    except failures:
        if run_directory.is_run(run):
            ui.warn(GO_ON.format(run=run))
        raise


def _loop(
    parts: Learner,
    state: RunState,
    run: Path,
    ui: Console,
    about: dict[str, Any],
    tracker: Tracker,
    safe_point: SafePoint,
) -> bool:
    """Evaluate, save, iterate; False if a stop was asked for.

    Each turn does one of the three. If it does not end well, the state before it is saved, unless
    it was the saving that failed.
    """
    config, actor, optimizer = parts.config, parts.roles.actor.model, parts.optimizer
    saved = state
    while True:
        before = Snapshot.of(run, actor, optimizer)
        done = state.iteration == config.num_iterations
        try:
            if evaluation_due(state, config):
                state = _evaluate(parts, state, run, ui, tracker, safe_point)
                try_report([run], ui.warn, running=True)
            elif state != saved and _save_due(state, config):
                saved = state
                run_directory.save(run, config, state, before, about)
            elif done:
                break
            else:
                safe_point()
                check_skips(state, config)
                state = _iterate_and_log(parts, state, run, ui, tracker, safe_point)
        except Exception as reason:
            before.put_back(actor, optimizer)
            if state.iteration and state != saved:
                run_directory.save(run, config, state, before, about)
            if run_directory.is_run(run):
                try_report([run], ui.warn)  # which must not go on saying that the run does
            if not isinstance(reason, StopRequested):
                raise
            parts.ranks.stopped()
            if run_directory.is_run(run):
                ui.warn(GO_ON.format(run=run))
            return False
    run_directory.save_named_adapter(run, "final", actor)
    try_report([run], ui.warn)
    if state.best.step is None:
        ui.warn("no evaluation passed the KL gate: there is no best/ adapter, final/ is the last")
    adapters = "final/" if state.best.step is None else "best/ and final/"
    ui.say(f"done: {run} (adapters in {adapters}, figures in {log.METRICS}, all of it in {REPORT})")
    return True


def _save_due(state: RunState, config: TrainConfig) -> bool:
    last = state.iteration == config.num_iterations
    return state.iteration > 0 and (last or state.iteration % config.checkpoint_every == 0)


def _iterate_and_log(
    parts: Learner, state: RunState, run: Path, ui: Console, tracker: Tracker, safe_point: SafePoint
) -> RunState:
    done = iterate(parts, state, ui, safe_point)
    step, metrics, config = done.state.iteration, done.metrics, parts.config
    if pace := measured_pace([*log.read(run / log.METRICS), metrics]):
        metrics["time/left"] = pace.left(config, step)
    log.append(run / log.METRICS, metrics)
    tracker(metrics)
    run_directory.log_completions(run, step, done.groups, done.raw_PK)
    run_directory.log_skips(run, step, done.groups, done.skips)
    if "skipped" not in done.metrics:
        ui.iteration(metrics, config.num_iterations)
        if config.show_every and step % config.show_every == 0:
            ui.samples(step, done.groups, done.raw_PK)
    if pace and step == 1 < config.num_iterations:
        say_how_long(ui, config, pace, step, "by the first iteration")
    for skip in done.skips:
        ui.warn(f"iteration {step}: {skip.stage} not finite, left out; see {run / log.SKIPPED}")
    return done.state


def _evaluate(
    parts: Learner, state: RunState, run: Path, ui: Console, tracker: Tracker, safe_point: SafePoint
) -> RunState:
    """Evaluate on held-out prompts, log, and keep the adapter if it is the best so far."""
    config, roles, step = parts.config, parts.roles, state.iteration
    clock = Clock()
    with clock.stage("evaluate"), ui.working("evaluating on held-out prompts"):
        evaluation = parts.evaluator(policy_at(parts, step), ui.progress, safe_point, parts.ranks)
    if step == 0:  # not before a whole evaluation went well: bad input leaves nothing behind
        for group, reward in zip(evaluation.groups, evaluation.rewards, strict=True):
            if not math.isfinite(reward):
                parts.evaluator.rewards.check_finite(group)
        run_directory.open_new(run, config)
    target = target_at(config, max(step - 1, 0))
    state = replace(state, evaluated=step)
    passed = bool(step) and state.best.passed_by(evaluation, target)
    if passed:
        state = replace(state, best=Best(step, evaluation.perplexity))
        run_directory.save_named_adapter(run, "best", roles.actor.model)
    metrics = {"step": step, **evaluation.metrics(), "eval_best": passed, **clock.metrics()}
    log.append(run / log.METRICS, metrics)
    tracker(metrics)
    run_directory.log_evaluation(run, step, evaluation)
    above = (
        f"KL above its gate of {target:g}" if evaluation.kl >= target else "perplexity not better"
    )
    for finding in new_findings(log.read(run / log.METRICS), config.gold_names):
        ui.warn(f"{finding.title}: {finding.evidence}. {finding.advice}")
    ui.evaluation(step, metrics, "" if step == 0 else "-> best" if passed else f"({above})")
    if step == 0:
        pace = guessed_pace(parts, clock.seconds["evaluate"])
        say_how_long(ui, config, pace, step, "a first guess")
    return state
