"""What a run directory tells, read once for its report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stats import WinRate, cohens_d, win_rate
from mlx_grpo.files.atomic import read_json
from mlx_grpo.grpo.learner import target_at
from mlx_grpo.grpo.state import Best
from mlx_grpo.models.reward_model import LEARNING_CURVE
from mlx_grpo.report.charts import Point
from mlx_grpo.report.health import Finding, Row, findings
from mlx_grpo.run import log
from mlx_grpo.run.checkpoint import step_directories
from mlx_grpo.run.directory import CHECKPOINTS, run_settings
from mlx_grpo.run.fields import (
    FIGURE,
    MAYBE,
    NUMBER,
    TABLE,
    TEXT,
    WHOLE,
    Kind,
    check_fields,
    check_kind,
)

ITERATION = {"kl/target": NUMBER, "time/iteration": NUMBER}
EVALUATION: dict[str, Kind] = {"eval_kl": MAYBE, "eval_best": (bool,)}
ANSWER = {"id": TEXT, "step": WHOLE, "prompt": TEXT, "completion": TEXT, "reward": MAYBE}


@dataclass(frozen=True)
class Record:
    """A run as it stands on disk."""

    run: Path
    config: TrainConfig
    rows: list[Row]
    answers: list[Row]
    """Held-out answers of all evaluations, sampled; none in runs of older versions."""
    shown: list[Row]
    """Those at --eval-temperature; none where that is --temperature."""
    learning_curve: list[Row]
    """Of the reward model, where its training left one."""
    origin: Row
    """`versions` and `inputs` as the newest checkpoint has them."""
    running: bool

    @cached_property
    def iterations(self) -> list[Row]:
        return [r for r in self.rows if "reward" in r]

    @cached_property
    def evaluations(self) -> list[Row]:
        return [r for r in self.rows if "eval_reward" in r]

    @property
    def step(self) -> int:
        """Iterations done."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether the last iteration was evaluated too, and nothing is at work."""
        if not self.evaluations:
            return False
        whole = self.step >= self.config.run.num_iterations
        return "eval_reward" in self.rows[-1] and (whole or self.ended_early) and not self.running

    @property
    def ended_early(self) -> bool:
        """Whether --early-stopping-patience ended it."""
        waited = self.rows[-1].get("eval_without_gain") or 0
        return 0 < self.config.evaluation.patience <= waited

    @property
    def chosen(self) -> Row:
        """The evaluation that stands for the run: the best one, else the last."""
        best = [e for e in self.evaluations if e["eval_best"]]
        return (best or self.evaluations)[-1]

    @property
    def findings(self) -> list[Finding]:
        return findings(self.rows, self.config.gold_names)

    def series(self, key: str) -> list[Point]:
        """(iteration, value) wherever a row has the key."""
        return [(r["step"], r[key]) for r in self.rows if r.get(key) is not None]

    def answered(self, step: int, test: str = "") -> dict[str, Row]:
        """Held-out answers of the evaluation after `step` iterations, by prompt id, as people are
        shown them; or those to a file of --test-prompts."""
        rows = self.shown if test or self._shows else self.answers
        return {a["id"]: a for a in rows if a["step"] == step and a.get("file", "") == test}

    @cached_property
    def _shows(self) -> bool:
        """Whether the evaluations that are compared have answers of their own to show; a run that
        an older version began has them only for the later ones."""
        return {0, self.chosen["step"]} <= {a["step"] for a in self.shown if "file" not in a}

    @property
    def temperature(self) -> float:
        """Of the answers that are compared."""
        own = self.config.evaluation.temperature
        return own if self._shows else self.config.rollout.temperature

    def wins(self, key: str = "reward", test: str = "") -> WinRate | None:
        """How often the chosen evaluation's answer beats the SFT model's.

        Args:
            test: a file of --test-prompts by its name; empty for --eval-prompts.
        """
        scores = self.scores(self.chosen["step"], key, test)
        return win_rate(*scores) if scores else None

    def effect(self, key: str = "reward") -> float | None:
        """Cohen's d of the chosen evaluation's answers over the SFT model's."""
        scores = self.scores(self.chosen["step"], key)
        return cohens_d(*scores) if scores else None

    def scores(
        self, step: int, key: str, test: str = ""
    ) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """What the SFT model's answers got, and those after `step` iterations, prompt by prompt;
        None before the first iteration and where a score is missing."""
        first, last = (self.answered(n, test) for n in (0, step))
        pairs = [(first[i].get(key), last[i].get(key)) for i in first if i in last]
        if not step or not pairs or any(None in pair for pair in pairs):
            return None
        before, after = zip(*pairs, strict=True)
        return before, after

    def winning_from(self, share: float) -> int | None:
        """Iterations until the win rate over the SFT model by reward first passes a share."""
        for row in self.evaluations:
            scores = self.scores(row["step"], "reward")
            if scores and win_rate(*scores).share > share:
                return int(row["step"])
        return None

    def decisions(self) -> list[tuple[Row, float, str]]:
        """(evaluation, its KL gate, whether it became best or why not), in order."""
        decided, best, metric = [], Best(), self.config.evaluation.best_metric
        for row in self.evaluations:
            gate = target_at(self.config, max(row["step"] - 1, 0))
            kl, value = (_number(row.get(name)) for name in ("eval_kl", metric))
            why = best.refusal(kl, value, gate, metric) if row["step"] else "SFT model"
            if row["eval_best"]:
                best, why = Best(row["step"], value), "best so far"
            decided.append((row, gate, why))
        return decided


def _number(value: float | None) -> float:
    """A figure of a row; the log has null where it was NaN or infinite."""
    return math.nan if value is None else value


def test_names(records: Sequence[Record]) -> list[str]:
    """The files of --test-prompts that any of the runs was measured on."""
    return list(dict.fromkeys(name for r in records for name in r.config.evaluation.test_names))


def gold_names(records: Sequence[Record]) -> list[str]:
    """The judges that any of the runs was measured by."""
    return list(dict.fromkeys(name for r in records for name in r.config.gold_names))


def read(run: Path, running: bool) -> Record:
    """Read a run.

    Raises:
        InputError: no run here, one without any figures yet, or damage.
    """
    found = read_figures(run, running)
    if not found.evaluations:
        raise InputError(f"{run}: nothing to report before the first evaluation")
    model = found.config.reward.model
    return replace(
        found,
        answers=held_out_answers(run),
        shown=_answers(run / log.EVAL_ANSWERS),
        learning_curve=[] if model == "none" else _log(Path(model) / LEARNING_CURVE),
        origin=_origin(run),
    )


def read_figures(run: Path, running: bool) -> Record:
    """Read settings and metrics of a run, without its answers and what it was made of. There may be
    no figures yet.

    Raises:
        InputError: no run here, or damage.
    """
    config = run_settings(run)
    rows = _log(run / log.METRICS)
    for number, row in enumerate(rows, 1):
        _check_figures(f"{run / log.METRICS}:{number}", row)
    return Record(run, config, rows, [], [], [], {}, running)


def held_out_answers(run: Path) -> list[Row]:
    """Every held-out answer of a run.

    Raises:
        InputError: a row is damaged.
    """
    return _answers(run / log.EVAL_COMPLETIONS)


def sampled_answers(run: Path) -> list[Row]:
    """Every answer that a run was trained on.

    Raises:
        InputError: a row is damaged.
    """
    return _answers(run / log.COMPLETIONS)


def _answers(file: Path) -> list[Row]:
    answers = _log(file)
    for number, answer in enumerate(answers, 1):
        check_fields(f"{file}:{number}", answer, ANSWER)
    return answers


def _log(path: Path) -> list[Row]:
    return log.read(path) if path.is_file() else []


def _check_figures(place: str, row: Row) -> None:
    """Raise InputError unless a row of metrics.jsonl has what a page is made of."""
    check_fields(place, row, {"step": WHOLE})
    if "reward" in row:
        check_fields(place, row, ITERATION)
    if "eval_reward" in row:
        check_fields(place, row, EVALUATION)
    for name, value in row.items():
        if name != "skipped":  # which names a stage
            check_kind(place, name, value, FIGURE)


def _origin(run: Path) -> Row:
    steps = step_directories(run / CHECKPOINTS)
    place = steps[0] / "state.json" if steps else None
    state = read_json(place) if place else {}
    found = {name: state.get(name, {}) for name in ("versions", "inputs")}
    check_fields(str(place), found, dict.fromkeys(found, TABLE))
    return found
