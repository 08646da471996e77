"""The loop of a training run: evaluate, save, iterate; stop and resume. The algorithm itself is
`grpo/iteration.py`. The loop is a generator, so that Python can follow it row by row.

With several ranks all of them run this loop, step by step. Rank 0 writes the run; the others have a
writer that writes nothing.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any

from mlx_grpo.backend.awake import kept_awake
from mlx_grpo.config.checks import check
from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.console.doing import duration
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, StopRequested, stop_signals
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.files.lock import locked
from mlx_grpo.grpo.iteration import iterate
from mlx_grpo.grpo.learner import Learner, first_state, target_at
from mlx_grpo.grpo.metrics import Clock
from mlx_grpo.grpo.state import Best, RunState
from mlx_grpo.rewards.functions import UserFunction
from mlx_grpo.run import log
from mlx_grpo.run.directory import Sides, Snapshot, check_vacant, with_date
from mlx_grpo.training.agreement import check_adapter, check_inputs, share_state
from mlx_grpo.training.setup import LoadModels, load_learner, load_models, provenance_of
from mlx_grpo.training.trackers import check_installed
from mlx_grpo.training.writer import Evaluated, RunWriter, SilentWriter, Writer

Rows = Generator[dict[str, Any], None, bool]
"""The rows of metrics.jsonl as they are written; returns False if a signal stopped the run."""
OnLog = Callable[[dict[str, Any]], object]


def ignore(row: dict[str, Any]) -> None:
    """What is done with a row where nobody asks for it."""


def train(
    config: TrainConfig,
    ui: Console,
    resume: bool = False,
    dry_run: bool = False,
    allow_change: bool = False,
    load: LoadModels = load_models,
    ranks: Ranks = ALONE,
    functions: Mapping[str, UserFunction] | None = None,
    on_log: OnLog = ignore,
) -> bool:
    """Run the whole training in `config.run_directory`; False if a signal stopped it early.

    Args:
        on_log: called with each row of metrics.jsonl once it is written; what it raises ends the
            run as Ctrl-C does, saved.

    Raises:
        InputError: as `training`.
    """
    rows = training(config, ui, resume, dry_run, allow_change, load, ranks, functions)
    with closing(rows):
        while True:
            try:
                row = next(rows)
            except StopIteration as end:
                return bool(end.value)
            on_log(row)


def training(
    config: TrainConfig,
    ui: Console,
    resume: bool = False,
    dry_run: bool = False,
    allow_change: bool = False,
    load: LoadModels = load_models,
    ranks: Ranks = ALONE,
    functions: Mapping[str, UserFunction] | None = None,
) -> Rows:
    """The training in `config.run_directory`, row by row. To close the generator early is a stop
    like Ctrl-C: the run is saved and can be resumed.

    Args:
        allow_change: resume even though settings or inputs that shape the numbers have changed.
        load: gets the weights; several runs may share them.
        ranks: those that share the work.
        functions: reward functions that were given as Python objects, by name.

    Raises:
        InputError: wrong input, or a run directory that is in the way.
    """
    check(config)
    date = with_date(config, resume).model.template_date
    config = with_settings(config, template_date=ranks.gather(date)[0])  # of the rank with the run
    run = config.run_directory
    if ranks.leads:
        check_installed(config.run.log)
    with locked(run) if ranks.leads and not dry_run else nullcontext():
        if ranks.leads and not dry_run:
            check_vacant(run, resume)
        with (
            _awake(config, ui, not dry_run),
            _loaded(config, ui, load, ranks, functions) as learner,
        ):
            if dry_run:
                return _dry_run(learner, ui)
            about, state = provenance_of(learner), first_state(config)
            check_inputs(ranks, about)
            writer: Writer = RunWriter(learner, run, ui, about) if ranks.leads else SilentWriter()
            state = writer.start(state, resume, allow_change)
            state = share_state(ranks, state, learner.roles.actor.model, learner.optimizer)
            with writer.writing(state), stop_signals(lambda: ui.reader_gone) as safe_point:
                return (yield from _loop(learner, state, writer, ui, ranks.watching(safe_point)))


@contextmanager
def _awake(config: TrainConfig, ui: Console, wanted: bool) -> Iterator[None]:
    with kept_awake(wanted and config.run.keep_awake == "auto") as awake:
        if awake:
            ui.say("this Mac stays awake during the run (caffeinate); see --keep-awake")
        yield


@contextmanager
def _loaded(
    config: TrainConfig,
    ui: Console,
    load: LoadModels,
    ranks: Ranks,
    functions: Mapping[str, UserFunction] | None,
) -> Iterator[Learner]:
    models = [] if config.reward.model == "none" else [config.reward.model]
    environment = [config.rollout.environment] if config.rollout.environment else []
    rewards = ", ".join([*models, *environment, *config.reward.functions])
    ui.say(f"mlx-grpo: {config.model.actor}, rewards: {rewards}, seed {config.run.seed}")
    with ui.working("loading"):
        learner = load_learner(config, ui, load, ranks, functions)
    try:
        yield learner
    finally:
        learner.evaluator.rewards.close()


def _dry_run(learner: Learner, ui: Console) -> bool:
    config = learner.config
    done = iterate(learner, first_state(config), ui)
    if done.skips and "kl" not in done.metrics:
        ui.warn(f"NaN or infinity in the {done.skips[0].stage}: nothing would be learned")
        return True
    ui.iteration({**done.metrics, "time/left": 0.0}, 1)
    if done.metrics["frac_dead_groups"] == 1:
        ui.warn("all completions of each prompt have the same reward: nothing would be learned")
    whole = duration(done.metrics["time/iteration"] * config.run.num_iterations)
    ui.say(
        f"dry run, nothing kept; {config.run.num_iterations} iterations like it take {whole}, "
        "evaluations not counted"
    )
    return True


def _loop(
    learner: Learner, state: RunState, writer: Writer, ui: Console, safe_point: SafePoint
) -> Rows:
    """Evaluate, save, iterate, hand out a row; False if a stop was asked for.

    Each turn does one of the four. If it fails or is stopped, the state before it is saved, unless
    it was the saving that failed.
    """
    config, ranks = learner.config, learner.ranks
    actor, optimizer = learner.roles.actor.model, learner.optimizer
    saved, row = state, None
    while True:
        before = Snapshot.of(config.run_directory, actor, optimizer)
        try:
            if row:
                handed_out, row = dict(row), None
                yield handed_out
            elif _evaluation_due(state, config):
                evaluated = _evaluate(learner, state, ui, safe_point)
                writer.evaluated(evaluated)
                state, row = evaluated.state, evaluated.metrics
            elif state != saved and _save_due(state, config):
                saved = state
                writer.save(state, before)
            elif _over(state, config):
                break
            else:
                safe_point()
                _check_skips(state, config)
                done = iterate(learner, state, ui, safe_point)
                check_adapter(ranks, actor, done.state.iteration)
                writer.iterated(done)
                state, row = done.state, done.metrics
        # libraries may call sys.exit; GeneratorExit: whoever takes the rows wants no more
        except (Exception, SystemExit, GeneratorExit) as reason:
            before.put_back(actor, optimizer)
            stopped = isinstance(reason, StopRequested | GeneratorExit)
            unsaved = state.iteration > 0 and state != saved
            writer.ended_early(stopped, (state, before) if unsaved else None)
            if not stopped:
                raise
            ranks.stopped()
            return False
    writer.finish(state)
    return True


def _evaluate(learner: Learner, state: RunState, ui: Console, safe_point: SafePoint) -> Evaluated:
    """Evaluate on held-out prompts and decide whether this is the best checkpoint so far."""
    step, clock, evaluator = state.iteration, Clock(), learner.evaluator
    telling = (ui.progress, safe_point, learner.ranks)
    policy, temperature = learner.policy(step), learner.config.evaluation.temperature
    tests = {}
    with clock.stage("evaluate"), ui.working("evaluating on held-out prompts"):
        found = evaluator(policy, *telling)
        shown = evaluator.shown(policy, found, temperature, *telling)
        for name, test in learner.tests.items():
            sampled = test(policy, *telling)
            tests[name] = Sides(sampled, test.shown(policy, sampled, temperature, *telling))
    figures, metric = found.metrics(), learner.config.evaluation.best_metric
    value = _chosen_by(metric, figures, step)
    gate = target_at(learner.config, max(step - 1, 0))
    refusal = state.best.refusal(found.kl, value, gate, metric) if step else "SFT model"
    best = state.best if refusal else Best(step, value)
    state = state.after_evaluation(metric, value, best)
    choice = {"eval_best": not refusal, "eval_without_gain": state.without_gain}
    tested = {k: v for n, t in tests.items() for k, v in t.sampled.metrics(f"eval_{n}").items()}
    metrics = {"step": step, **figures, **tested, **choice, **clock.metrics()}
    return Evaluated(state, Sides(found, shown), tests, metrics, refusal)


def _chosen_by(metric: str, figures: Mapping[str, float], step: int) -> float:
    """The figure that chooses the best checkpoint; NaN where a later evaluation lacks it.

    Raises:
        InputError: the first evaluation has no such figure.
    """
    if metric not in figures and not step:
        names = ", ".join(name.removeprefix("eval_") for name in figures)
        raise InputError(
            f"--metric-for-best-model: an evaluation of this run has no figure "
            f"'{metric.removeprefix('eval_')}'; choose one of {names}"
        )
    return figures.get(metric, math.nan)


def _evaluation_due(state: RunState, config: TrainConfig) -> bool:
    """Whether an evaluation comes before the next iteration."""
    every, last = config.evaluation.every, state.iteration == config.run.num_iterations
    return state.evaluated < state.iteration and (last or state.iteration % every == 0)


def _over(state: RunState, config: TrainConfig) -> bool:
    """Whether no further iteration comes, once this one is evaluated."""
    impatient = 0 < config.evaluation.patience <= state.without_gain
    return impatient or state.iteration == config.run.num_iterations


def _save_due(state: RunState, config: TrainConfig) -> bool:
    due = _over(state, config) or state.iteration % config.run.checkpoint_every == 0
    return state.iteration > 0 and due


def _check_skips(state: RunState, config: TrainConfig) -> None:
    """Refuse to go on after too many iterations with NaN or infinity.

    Raises:
        InputError: with what to look at.
    """
    if state.skipped_in_a_row >= config.run.max_skipped_steps:
        run = config.run_directory
        raise InputError(
            f"{run}: NaN or infinity in {state.skipped_in_a_row} iterations in a row (see "
            f"{run / log.SKIPPED}); check the reward, or resume with a lower --learning-rate and "
            "--allow-config-change"
        )
