"""What the loop writes and says: all of it on rank 0, nothing on the others."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_grpo.backend.pressure import swapped_bytes
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.grpo.evaluate import Evaluation
from mlx_grpo.grpo.iteration import Iteration
from mlx_grpo.grpo.learner import Learner
from mlx_grpo.grpo.state import RunState
from mlx_grpo.report.final import lost_since_best
from mlx_grpo.report.health import new_findings
from mlx_grpo.report.write import REPORT, try_report
from mlx_grpo.run import directory, log
from mlx_grpo.run.directory import Sides, Snapshot
from mlx_grpo.training.estimate import guessed_pace, measured_pace, say_how_long
from mlx_grpo.training.trackers import Tracker, open_trackers
from mlx_grpo.training.watch import look_around

Unsaved = tuple[RunState, Snapshot]
RESUME = "stopped early; resume with: {command}"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation during training."""

    state: RunState
    """After it."""
    held_out: Sides
    """On --eval-prompts."""
    tests: dict[str, Sides]
    """On each file of --test-prompts, by its name."""
    metrics: dict[str, Any]
    refusal: str
    """Why it is not the best checkpoint so far; empty if it is."""


class Writer(Protocol):
    """What the loop tells of its progress, in this order."""

    def start(self, state: RunState, resume: bool, allow_change: bool) -> RunState:
        """Check the disk and restore a run that is resumed; returns the state to go on from."""

    def writing(self, state: RunState) -> AbstractContextManager[None]:
        """Hold what is open while the loop runs."""

    def evaluated(self, evaluated: Evaluated) -> None:
        """After an evaluation."""

    def iterated(self, done: Iteration) -> None:
        """After an iteration."""

    def save(self, state: RunState, before: Snapshot) -> None:
        """A checkpoint is due."""

    def ended_early(self, stopped: bool, unsaved: Unsaved | None) -> None:
        """A stop was asked for, or a turn failed; the last good state, where it was not saved."""

    def finish(self, state: RunState) -> None:
        """After the last turn."""


class SilentWriter:
    """Writes nothing: for ranks other than 0."""

    def start(self, state: RunState, resume: bool, allow_change: bool) -> RunState:
        return state

    def writing(self, state: RunState) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluated(self, evaluated: Evaluated) -> None: ...

    def iterated(self, done: Iteration) -> None: ...

    def save(self, state: RunState, before: Snapshot) -> None: ...

    def ended_early(self, stopped: bool, unsaved: Unsaved | None) -> None: ...

    def finish(self, state: RunState) -> None: ...


class RunWriter:
    """Writes the run directory, the trackers and the console."""

    def __init__(self, learner: Learner, run: Path, ui: Console, about: dict[str, Any]):
        self.learner, self.run, self.ui, self.about = learner, run, ui, about
        self._track: Tracker = lambda row: None
        self._swapped = swapped_bytes()
        """On the swap before the run."""
        self._rows: list[dict[str, Any]] = []
        """Of metrics.jsonl, as a reader would find them."""

    def start(self, state: RunState, resume: bool, allow_change: bool) -> RunState:
        """Check the disk and restore a run that is resumed.

        Raises:
            InputError: too little disk space, or a run that cannot be resumed.
        """
        config, actor = self.learner.config, self.learner.roles.actor.model
        directory.check_space(self.run, config, actor)
        if not resume:
            return state
        with self._telling_how_to_resume(OSError):
            state, warnings = directory.restore(
                self.run, config, state, actor, self.learner.optimizer, self.about, allow_change
            )
        for warning in warnings:
            self.ui.warn(warning)
        self.ui.say(f"resuming after iteration {state.iteration}")
        self._rows = log.read(self.run / log.METRICS) if state.iteration else []
        if pace := measured_pace(self._rows):
            say_how_long(self.ui, config, pace, state.iteration, "at its pace so far")
        return state

    @contextmanager
    def writing(self, state: RunState) -> Iterator[None]:
        """Hold the live view and the trackers open."""
        config = self.learner.config
        with (
            self._telling_how_to_resume(BaseException),
            self.ui.training(config.run.num_iterations, self._rows),
            open_trackers(config, self.run, state.iteration, self.ui.warn) as self._track,
        ):
            yield

    @contextmanager
    def _telling_how_to_resume(self, failure: type[BaseException]) -> Iterator[None]:
        try:
            yield
        except failure:
            self._say_how_to_resume()
            raise

    def _say_how_to_resume(self) -> None:
        self.ui.end_view()
        if directory.in_place(self.run):
            self.ui.warn(RESUME.format(command=directory.resume_command(self.run)))

    def evaluated(self, evaluated: Evaluated) -> None:
        """Log an evaluation, and keep the adapter if it is the best so far."""
        step, config = evaluated.state.iteration, self.learner.config
        directory.check_in_place(self.run)
        if step == 0:  # not before a whole evaluation went well: bad input leaves nothing behind
            for sides in (evaluated.held_out, *evaluated.tests.values()):
                self._check_figures(sides.sampled)
            directory.open_new(self.run, config)
        if not evaluated.refusal:
            actor = self.learner.roles.actor.model
            directory.save_named_adapter(self.run, "best", actor, step)
        self._log(evaluated.metrics)
        directory.log_evaluation(self.run, step, evaluated.held_out, evaluated.tests)
        note = f"({evaluated.refusal})" if evaluated.refusal else "-> best"
        self.ui.evaluation(step, evaluated.metrics, note if step else "")
        for name, sides in evaluated.tests.items():
            self.ui.evaluation(step, sides.sampled.metrics(), f"({name})")
        for finding in new_findings(self._rows, config.gold_names):
            self.ui.warn(f"{finding.title}: {finding.evidence}. {finding.advice}")
        if step == 0:
            pace = guessed_pace(self.learner, evaluated.metrics["time/evaluate"])
            say_how_long(self.ui, config, pace, step, "a first guess")
        try_report([self.run], self.ui.warn, running=True)

    def _check_figures(self, evaluation: Evaluation) -> None:
        """Raise InputError that names the source of a figure that is NaN or infinite."""
        groups = (g for g in evaluation.groups for _ in g.completions)
        for group, reward in zip(groups, evaluation.rewards, strict=True):
            if not math.isfinite(reward):
                self.learner.evaluator.rewards.check_finite(group)
        if not math.isfinite(evaluation.perplexity):
            raise InputError(
                f"{self.learner.config.model.actor}: its log-probs are not finite; check the "
                "model's files, or compute in another --precision"
            )

    def iterated(self, done: Iteration) -> None:
        """Log an iteration."""
        run, ui, config, step = self.run, self.ui, self.learner.config, done.state.iteration
        total, metrics = config.run.num_iterations, done.metrics
        directory.check_in_place(run)
        if pace := measured_pace([*self._rows, metrics]):
            metrics["time/left"] = pace.left(config, step)
        self._log(metrics)
        directory.log_completions(run, step, done.groups, done.raw_PK)
        directory.log_skips(run, step, done.groups, done.skips)
        if "skipped" not in metrics:
            ui.iteration(metrics, total)
            if config.run.show_every and step % config.run.show_every == 0:
                ui.samples(step, done.groups, done.raw_PK)
        if pace and step == 1 < total:
            say_how_long(ui, config, pace, step, "by the first iteration")
        size = directory.checkpoint_bytes(self.learner.roles.actor.model)
        look_around(run, ui, self._swapped, metrics.get("memory/peak", 0.0), size)
        for skip in done.skips:
            ui.warn(
                f"iteration {step}: NaN or infinity in the {skip.stage}, skipped; see "
                f"{run / log.SKIPPED}"
            )

    def _log(self, metrics: dict[str, Any]) -> None:
        log.append(self.run / log.METRICS, metrics)
        self._rows.append(log.as_written(metrics))
        self._track(metrics)

    def save(self, state: RunState, before: Snapshot) -> None:
        """Write a checkpoint.

        Raises:
            InputError: the disk is too full, or the directory is not there any more.
        """
        directory.save(self.run, self.learner.config, state, before, self.about)

    def ended_early(self, stopped: bool, unsaved: Unsaved | None) -> None:
        """Save, and bring the report up to date: it must not say that the run still goes on."""
        if directory.in_place(self.run):
            if unsaved:
                self.save(*unsaved)
            try_report([self.run], self.ui.warn)
        if stopped:
            self._say_how_to_resume()

    def finish(self, state: RunState) -> None:
        """Write `final/` and the last report."""
        directory.check_in_place(self.run)
        directory.save_named_adapter(
            self.run, "final", self.learner.roles.actor.model, state.iteration
        )
        try_report([self.run], self.ui.warn)
        if state.best.step is None:
            self.ui.warn(
                "no evaluation passed the KL gate, so there is no best/ adapter; final/ is the "
                "last one"
            )
        self.ui.end_view()
        evaluation, total = self.learner.config.evaluation, self.learner.config.run.num_iterations
        if state.iteration < total:
            figure, count = evaluation.best_metric.removeprefix("eval_"), state.without_gain
            waited = "evaluation" if count == 1 else f"{count} evaluations"
            self.ui.say(
                f"ended after iteration {state.iteration} of {total}: {figure} did not improve in "
                f"the last {waited}; to go on, type: "
                f"{directory.resume_command(self.run)} --early-stopping-patience 0"
            )
        if lost := lost_since_best(self._rows, self.learner.config.gold_names):
            self.ui.say(lost)
        adapters = "final/" if state.best.step is None else "best/ and final/"
        self.ui.say(
            f"done: {self.run} (adapters in {adapters}, metrics in {log.METRICS}, report in "
            f"{REPORT})"
        )
