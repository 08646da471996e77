"""Which curves a report shows: of one run, or of several with their mean and spread."""

from collections.abc import Sequence
from typing import Literal

from mlx_grpo.config.settings import judge_label
from mlx_grpo.report.charts import Band, Chart, Line, Point, smoothed, spread, stepped
from mlx_grpo.report.record import Record, gold_names

TARGET_BAND = 0.3
"""The KL counts as held within this share of its target."""
FEW = 40
"""Up to so many iterations a curve is drawn as it is, beyond it smoothed as well."""
STAGES = ("rollout", "reward", "logprob", "update", "evaluate")
LOOKS: tuple[Literal["a", "b", "c", "d", "e"], ...] = ("a", "b", "c", "d", "e")


def figures(records: Sequence[Record]) -> list[Chart]:
    """Those that have something to show."""
    charts = _single(records[0]) if len(records) == 1 else _several(records)
    return [chart for chart in charts if chart.drawn]


def _single(r: Record) -> list[Chart]:
    trained = [name for name in _sources(r) if name not in r.config.gold_names]
    return [
        Chart("Reward", "raw score", _both(r, "reward", "eval_reward")),
        *(_source(r, name, f"Reward: {name}") for name in trained if len(trained) > 1),
        *(_source(r, name, judge_label(name).capitalize()) for name in r.config.gold_names),
        Chart(
            "KL to the SFT model",
            "nats per token",
            [*_both(r, "kl", "eval_kl"), _target(r)],
            [_target_band(r)],
        ),
        Chart("Perplexity of reference answers", "held-out", _both(r, "", "eval_perplexity")),
        *(_tested(r, name) for name in r.config.evaluation.test_names),
        Chart("Length", "tokens per answer", _both(r, *_twins("completions/mean_length"))),
        Chart(
            "Answers cut off", "share at the limit", _both(r, *_twins("completions/clipped_ratio"))
        ),
        Chart(
            "Repetition",
            "share of 4-grams said before",
            _both(r, *_twins("completions/repetition")),
        ),
        Chart("Dead groups", "share that taught nothing", _trained(r, "frac_dead_groups")),
        Chart("Clip fraction", _clipped(r), _trained(r, "clip_ratio/region_mean")),
        _actuator(r),
        Chart("Time by stage", "seconds", _stages(r, "time")),
        Chart("Peak memory by stage", "GB", _stages(r, "memory", 1e-9)),
        *_reward_model(r),
    ]


def _tested(r: Record, name: str) -> Chart:
    points = r.series(f"eval_{name}_reward")
    return Chart(f"Reward on {name}", "raw score", [Line(name, points, "b", marks=True)])


def _several(records: Sequence[Record]) -> list[Chart]:
    kl = _mean(records, "kl", "KL to the SFT model", "nats per token")
    return [
        _mean(records, "eval_reward", "Held-out reward", "raw score"),
        *(_gold(records, name) for name in gold_names(records)),
        Chart(kl.title, kl.unit, [*kl.lines, _target(records[0])], kl.bands),
        _mean(records, "eval_kl", "Held-out KL", "nats per token"),
        _mean(records, "eval_perplexity", "Perplexity of reference answers", "held-out"),
        _mean(records, "eval_completions/mean_length", "Held-out length", "tokens per answer"),
        _mean(records, "reward", "Reward while training", "raw score"),
        _mean(records, "frac_dead_groups", "Dead groups", "share that taught nothing"),
    ]


def _mean(records: Sequence[Record], key: str, title: str, unit: str) -> Chart:
    runs = [(f"seed {r.config.run.seed}", s) for r in records if (s := r.series(key))]
    runs = [(seed, smoothed(s) if len(s) > FEW else s) for seed, s in runs]
    mean, area = spread([s for _, s in runs])
    each = [Line(seed, s, "faint") for seed, s in runs]
    name = f"mean of {len(runs)} runs"
    marks = key.startswith("eval")
    return Chart(
        title, unit, [*each, Line(name, mean, "a", marks)], [Band("± one standard deviation", area)]
    )


def _twins(key: str) -> tuple[str, str]:
    return key, f"eval_{key}"


def _both(r: Record, trained: str, held_out: str) -> list[Line]:
    """A figure of the rollouts and the same of the evaluations."""
    evaluated = Line("held-out prompts", r.series(held_out), "b", marks=True)
    return [*_trained(r, trained), *([evaluated] if evaluated.points else [])]


def _trained(r: Record, key: str) -> list[Line]:
    points = r.series(key)
    if len(points) <= FEW:
        return [Line("training", points)] if points else []
    return [Line("each iteration", points, "faint"), Line("training, smoothed", smoothed(points))]


def _sources(r: Record) -> list[str]:
    """In the order in which they first applied: one may have nothing to say of a whole batch."""
    keys = (key for row in r.iterations for key in row if key.startswith("rewards/"))
    return list(dict.fromkeys(key.split("/")[1] for key in keys))


def _source(r: Record, name: str, title: str) -> Chart:
    return Chart(title, "score", _both(r, *_twins(f"rewards/{name}/mean")))


def _gold(records: Sequence[Record], name: str) -> Chart:
    title = judge_label(name).capitalize()
    return _mean(records, f"eval_rewards/{name}/mean", title, "held-out")


def _target(r: Record) -> Line:
    return Line("target", r.series("kl/target"), "target", steps=True)


def _target_band(r: Record) -> Band:
    target = r.series("kl/target")
    area = [(x, v * (1 - TARGET_BAND), v * (1 + TARGET_BAND)) for x, v in target]
    return Band(f"target ± {TARGET_BAND:.0%}", stepped(area))


def _clipped(r: Record) -> str:
    return "share of tokens" if r.config.optimizer.ratio_level == "token" else "share of answers"


def _actuator(r: Record) -> Chart:
    if any(value for _, value in r.series("kl/decay")):
        return Chart("Decay of the adapter", "share per iteration", _trained(r, "kl/decay"))
    if any(value for _, value in r.series("kl/beta")):
        return Chart("Weight of the KL penalty (beta)", "score per nat", _held(r, "kl/beta"))
    return Chart("Learning rate", "AdamW", _held(r, "learning_rate"))


def _held(r: Record, key: str) -> list[Line]:
    """A setting that an iteration runs with and that the controller may change after it."""
    return [Line("each iteration", points, steps=True)] if (points := r.series(key)) else []


def _stages(r: Record, what: str, unit: float = 1.0) -> list[Line]:
    lines = []
    for stage, look in zip(STAGES, LOOKS, strict=True):
        points: list[Point] = [(x, unit * y) for x, y in r.series(f"{what}/{stage}")]
        if points and not (what == "time" and stage == "evaluate"):  # another scale altogether
            lines.append(Line(stage, smoothed(points) if len(points) > FEW else points, look))
    return lines


def _reward_model(r: Record) -> list[Chart]:
    def curve(key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in r.learning_curve if row.get(key) is not None]

    losses = [Line("training", curve("train_loss")), Line("held-out", curve("valid_loss"), "b")]
    accuracy = Line("held-out", curve("valid_accuracy"), "b")
    step = "optimizer step"
    return [
        Chart("Reward model: loss while it was trained", "per pair", losses, axis=step),
        Chart("Reward model: accuracy", "share of held-out pairs", [accuracy], axis=step),
    ]
