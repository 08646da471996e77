"""How long a run will take, evaluations included: guessed from the first one, then measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.console.doing import duration
from mlx_grpo.console.output import Console
from mlx_grpo.grpo.learner import Learner
from mlx_grpo.plan.devices import MACS
from mlx_grpo.plan.memory import Workload
from mlx_grpo.plan.planner import planner_for
from mlx_grpo.plan.timing import estimate, stage_costs

LATEST = 10
"""Iterations whose mean time stands for those to come."""
LONG_HOURS = 48.0
SHORTER = (
    "fewer --num-iterations, or a smaller --batch-size, --K or --max-completion-length make it "
    "shorter, a larger --eval-every or --eval-limit N too; it can be stopped with Ctrl-C and "
    "resumed at any time"
)


@dataclass(frozen=True)
class Pace:
    """Seconds of an iteration and of an evaluation."""

    iteration: float
    evaluation: float

    def left(self, config: TrainConfig, done: int) -> float:
        """Seconds of the iterations after the first `done`, with their evaluations."""
        total = config.run.num_iterations
        return (total - done) * self.iteration + evaluations_left(config, done) * self.evaluation


def evaluations_left(config: TrainConfig, done: int) -> int:
    """Evaluations after those of iteration `done`: every --eval-every, and after the last."""
    total, every = config.run.num_iterations, config.evaluation.every
    return total // every - done // every + (total % every > 0 and done < total)


def guessed_pace(learner: Learner, evaluation: float) -> Pace:
    """From the first evaluation, which took so many seconds: an iteration does what the plan says
    it does, at the speed that the evaluation had."""
    planned = planner_for(learner.config, ranks=learner.ranks.size)
    evaluators = [learner.evaluator, *learner.tests.values()]
    asked = -(-sum(len(e.prompts) for e in evaluators) // learner.ranks.size)
    one_answer = replace(planned.work, prompts=asked, k=1, kl_share=1.0)
    samples = replace(one_answer, k=learner.evaluator.sampling.k)
    # which machine matters little: only the ratio is used
    machine = replace(MACS["m2"], reached=None)

    def seconds(work: Workload, *stages: str) -> float:
        costs = stage_costs(planned.model, planned.reward, work, learner.choice)
        times = estimate(costs, machine)
        return sum(times[stage].expected for stage in stages or times)

    of_evaluation = seconds(samples, "rollout", "reward", "logprob")
    if not learner.evaluator.shows_samples(learner.config.evaluation.temperature):
        of_evaluation += seconds(one_answer, "rollout", "reward")  # the answers that are shown
    return Pace(evaluation * seconds(planned.work) / of_evaluation, evaluation)


def measured_pace(rows: Sequence[dict[str, Any]]) -> Pace | None:
    """From the rows of metrics.jsonl, once there is an iteration."""
    iterations = [r["time/iteration"] for r in rows if "time/iteration" in r]
    evaluations = [r["time/evaluate"] for r in rows if "time/evaluate" in r]
    if not iterations:
        return None
    return Pace(fmean(iterations[-LATEST:]), fmean(evaluations[-LATEST:]) if evaluations else 0.0)


def say_how_long(ui: Console, config: TrainConfig, pace: Pace, done: int, how: str) -> None:
    """One line: what is left of the run, and of all runs where it is one of several; a warning
    where that is days.

    Args:
        how: what the estimate rests on.
    """
    left, position, runs = pace.left(config, done), *ui.run
    others = (runs - position) * (pace.left(config, 0) + pace.evaluation)
    iterations, count = config.run.num_iterations - done, evaluations_left(config, done)
    further = "run" if runs - position == 1 else f"{runs - position} runs"
    after = f"; with the {further} after it about {duration(left + others)}"
    ui.say(
        f"time left, {how}: about {duration(left)} ({iterations} iterations of "
        f"{duration(pace.iteration)}, {count} {'evaluation' if count == 1 else 'evaluations'} of "
        f"{duration(pace.evaluation)}){after if others else ''}"
    )
    if left + others > LONG_HOURS * 3600 and ui.once("long"):
        ui.warn(f"this takes about {duration(left + others)}: {SHORTER}")
