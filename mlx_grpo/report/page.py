"""The words and tables of a report, and the page they stand on."""

import base64
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from mlx_grpo.config.settings import (
    REPEATED,
    SETTINGS,
    decoding,
    flag_of,
    flat_values,
    judge_label,
)
from mlx_grpo.config.sources import setting_help
from mlx_grpo.console.doing import duration
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import visible
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.stats import WinRate, evenly, mean_interval
from mlx_grpo.report.charts import svg
from mlx_grpo.report.figures import figures
from mlx_grpo.report.final import lost_since_best
from mlx_grpo.report.health import Row
from mlx_grpo.report.numbers import file_name, link
from mlx_grpo.report.record import Record, gold_names, test_names
from mlx_grpo.run import log
from mlx_grpo.run.directory import resume_command

REFRESH_SECONDS = 30
EXAMPLES = 6
MOST_ANSWERS = 500
"""In the table of answers; more would be a page of many megabytes."""
WINNING = 0.6
"""A win rate over the SFT model whose first evaluation is told."""
NEVER = f"has not passed {WINNING:.0%}"
Cell = tuple[str, ...]
"""A figure, and what stands smaller beside it."""


@dataclass(frozen=True)
class Figure:
    """A row of the table before and after."""

    name: str
    key: str
    form: str

    def text(self, row: Row) -> str:
        return number(row, self.key, self.form)


def render(records: Sequence[Record], title: str) -> Iterator[str]:
    """The page, complete in itself, in pieces."""
    script = Markup((files(__package__) / "page.js").read_text("utf-8"))
    return _template().generate(
        title=title,
        script=script,
        script_hash=_digest(script),
        records=records,
        refresh=REFRESH_SECONDS if any(r.running for r in records) else 0,
        written=time.strftime("%Y-%m-%d %H:%M"),
        charts=[(chart, svg(chart), link(chart), file_name(chart)) for chart in figures(records)],
        table=table(records),
        summary=summary,
        status=status,
        pace=pace,
        going_on=going_on,
        judging=judging,
        warnings=_warnings(records),
        number=number,
        unbroken=unbroken,
        answers=answers,
        examples=examples,
        decoding=decoding,
        chooser=chooser,
        settings=settings_table,
        command=training_command,
    )


@cache
def _template() -> Template:
    """Compiled once: that takes longer than writing a page, and a run writes many."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_harmless
    )
    return environment.from_string((files(__package__) / "page.html").read_text("utf-8"))


def _digest(script: str) -> str:
    """How the page's policy names the one script that may run in it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _harmless(value: Any) -> Any:
    """What data holds must steer neither a browser nor `cat`; by the piece, not a page at once."""
    return type(value)(visible(value, keep="\n\t")) if isinstance(value, str) else value


def number(row: Row, key: str, form: str) -> str:
    """A figure, or what it is instead."""
    return log.figure(row[key], form) if key in row else ""


def status(r: Record) -> str:
    """How far a run is."""
    place = f"iteration {r.step} of {r.config.run.num_iterations}"
    if r.running:
        return f"running, {place}"
    if r.finished:
        return f"ended early, {place}" if r.ended_early else "finished"
    return f"stopped at {place}"


def pace(r: Record) -> str:
    """Roughly how long it is from one page of a run to the next, once that is known."""
    if not r.iterations:
        return ""
    between = r.config.evaluation.every * fmean(row["time/iteration"] for row in r.iterations[-10:])
    return f", about every {duration(between + r.evaluations[-1].get('time/evaluate', 0.0))}"


def going_on(r: Record) -> str:
    """What to type to resume a run."""
    return resume_command(r.run)


def judging(r: Record) -> str:
    """What to type to judge a run on other prompts."""
    return command("mlx-grpo", "eval", r.run, "--prompts", "FRESH.jsonl")


def summary(r: Record) -> list[str]:
    """What happened, in sentences."""
    first, now = r.evaluations[0], r.chosen
    if not now["step"]:
        return ["Training has begun; the first evaluation of what it learns is still to come."]
    which = "the best checkpoint" if now["eval_best"] else "the last evaluation"
    said = [
        f"At {which}, after {now['step']} iterations, the mean reward on held-out prompts is "
        f"{number(now, 'eval_reward', '+.2f')}; the SFT model has "
        f"{number(first, 'eval_reward', '+.2f')}."
    ]
    if rate := r.wins():
        said.append(
            f"Of the {decoding(r.temperature)} answers, its own has the higher reward on "
            f"{_interval(rate)}; {_reached(r)}."
        )
    for name in r.config.gold_names:
        before, after = (e.get(f"eval_rewards/{name}/mean") for e in (first, now))
        if before is not None and after is not None:
            rate = r.wins(f"rewards/{name}")
            told = f"; it prefers the answer on {_interval(rate)}" if rate else ""
            judge = "The gold judge" if name == "gold" else f"The gold judge ({name})"
            means = f"{after:.3f} on average (SFT model: {before:.3f})"
            said.append(f"{judge} scores the answers {means}{told}.")
    perplexities = [number(e, "eval_perplexity", ".2f") for e in (now, first)]
    lengths = [number(e, "eval_completions/mean_length", ".0f") for e in (now, first)]
    said.append(
        f"The KL to the SFT model is {number(now, 'eval_kl', '.4f')} nats per token; the "
        f"perplexity of reference answers {perplexities[0]} (SFT model: {perplexities[1]}); an "
        f"answer has {lengths[0]} tokens (SFT model: {lengths[1]})."
    )
    if r.finished and (lost := lost_since_best(r.rows, r.config.gold_names)):
        said.append(lost)
    return said


def _reached(r: Record) -> str:
    step = r.winning_from(WINNING)
    return f"its win rate {f'passed {WINNING:.0%} after {step} iterations' if step else NEVER}"


def _interval(rate: WinRate) -> str:
    low, high = rate.wilson()
    ties = f", {rate.tied} counted half" if rate.ties else ""
    return f"{rate.share:.0%} (95 % interval {low:.0%} to {high:.0%}) of the prompts{ties}"


def _warnings(records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """(title, (run, figures) of each run it holds for, what to try)."""
    found = [(r.run.name, f) for r in records for f in r.findings]
    advice = {f.title: f.advice for _, f in found}
    return [
        (title, [(name, f.evidence) for name, f in found if f.title == title], text)
        for title, text in advice.items()
    ]


def chooser(r: Record) -> Figure:
    """The figure that chose the best checkpoint."""
    metric = r.config.evaluation.best_metric
    return Figure(metric.removeprefix("eval_"), metric, ".2f" if "perplexity" in metric else ".4g")


def rows(records: Sequence[Record]) -> list[Figure]:
    """What the table has, of what the runs have."""
    judges = {f"eval_rewards/{name}/mean": name for name in gold_names(records)}
    table = [
        Figure("reward", "eval_reward", "+.3f"),
        *(Figure(judge_label(name), key, ".3f") for key, name in judges.items()),
        Figure("KL to the SFT model, nats per token", "eval_kl", ".4f"),
        Figure("perplexity of reference answers", "eval_perplexity", ".2f"),
        Figure("length, tokens", "eval_completions/mean_length", ".1f"),
        Figure("share of answers cut off", "eval_completions/clipped_ratio", ".0%"),
        *_rates(records),
        *(
            Figure(f"{what}, {test}", f"eval_{test}_{key.removeprefix('eval_')}", form)
            for test in test_names(records)
            for what, key, form in (
                ("reward", "eval_reward", "+.3f"),
                *((judge_label(name), key, ".3f") for key, name in judges.items()),
                ("perplexity", "eval_perplexity", ".2f"),
            )
        ),
    ]
    return [f for f in table if any(f.key in r.chosen for r in records)]


def _rates(records: Sequence[Record]) -> list[Figure]:
    """`mean@n` and `pass@k` of rewards that are 0 or 1."""
    keys = dict.fromkeys(key for r in records for key in r.chosen)
    found = [re.fullmatch(r"eval_rewards/(.+)/(.+@\d+)", key) for key in keys]
    return [Figure(f"{m[2]} of {m[1]}", m[0], ".1%") for m in found if m]


@dataclass(frozen=True)
class Table:
    """Before and after, side by side."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def table(records: Sequence[Record]) -> Table:
    """The figures of the SFT model and after training, what has changed, and each of several runs;
    then how often the answers win."""
    several = len(records) > 1
    which = "best" if records[0].chosen["eval_best"] else "now"
    after = "after" if several else f"{which} (iteration {records[0].chosen['step']})"
    runs = records if several else []
    body = [
        (
            f.name,
            [
                _mean(records, f, "first"),
                _mean(records, f, "chosen"),
                _change(records, f),
                *((f.text(r.chosen),) for r in runs),
            ],
        )
        for f in rows(records)
    ]
    judges = {"reward": "reward", **{f"rewards/{n}": judge_label(n) for n in gold_names(records)}}
    how = f"{' or '.join(sorted({decoding(r.temperature) for r in records}))} answers"
    for key, judge in judges.items():
        for test in ("", *test_names(records)):
            rates = [r.wins(key, test) for r in records]
            if any(rates):
                cells: list[Cell] = [_rate(rate) for rate in rates] if several else []
                name = f"wins over the SFT model by {judge}, {how}{test and f', {test}'}"
                body.append((name, [(), _rate(pooled(rates)), (), *cells]))
    effects: list[Cell] = [_signed(r.effect()) for r in records]
    if any(effects):
        name = f"effect size by reward (Cohen's d), {how}"
        known = [d for r in records if (d := r.effect()) is not None]
        body.append((name, [(), _spread(known, "+.2f"), (), *(effects if several else [])]))
    if several:
        reached = [r.winning_from(WINNING) for r in records]
        cells = [(f"iteration {step}",) if step else ("not yet",) for step in reached]
        body.append((f"win rate by reward first over {WINNING:.0%}", [(), (), (), *cells]))
        taken = [(_taken(r), f"iteration {r.chosen['step']}") for r in records]
        body.append(("evaluation taken", [(), (), (), *taken]))
    title = "held-out prompts" + (" (mean ± sd)" if several else "")
    return Table([title, "SFT model", after, "change", *(r.run.name for r in runs)], body)


def pooled(rates: Sequence[WinRate | None]) -> WinRate | None:
    """Wins over the prompts of all runs together."""
    known = [rate for rate in rates if rate]
    if not known:
        return None
    sums = (sum(getattr(rate, name) for rate in known) for name in ("wins", "prompts", "ties"))
    return WinRate(*sums)


def over(records: Sequence[Record], figure: Figure, which: str) -> str:
    """Mean and standard deviation over runs, `first` or `chosen` evaluation."""
    return " ".join(_mean(records, figure, which))


def _mean(records: Sequence[Record], figure: Figure, which: str) -> Cell:
    rows = [r.evaluations[0] if which == "first" else r.chosen for r in records]
    if len(rows) == 1:
        return (figure.text(rows[0]),)
    values = [row[figure.key] for row in rows if row.get(figure.key) is not None]
    return _spread(values, figure.form) if values else ()


def _change(records: Sequence[Record], figure: Figure) -> Cell:
    pairs = [(r.evaluations[0].get(figure.key), r.chosen.get(figure.key)) for r in records]
    changes = [b - a for a, b in pairs if a is not None and b is not None]
    if not changes:
        return ()
    if figure.form.endswith("%"):  # a difference of shares is no share
        points = [100 * c for c in changes]
        *middle, last = _spread(points, "+.0f")
        return (*middle, f"{last} points", *_range(points, "+.0f")) if middle else (last, "points")
    form = f"+{figure.form.removeprefix('+')}"
    return *_spread(changes, form), *_range(changes, form)


def _spread(values: Sequence[float], form: str) -> Cell:
    middle = format(fmean(values), form)
    if len(values) == 1:
        return (middle,)
    return middle, f"± {stdev(values):{form.replace('+', '')}}"


def _range(values: Sequence[float], form: str) -> Cell:
    """The 95 % interval of the mean over runs, in two lines: a phone has no room for one."""
    if len(values) == 1:
        return ()
    low, high = mean_interval(values)
    return f"{low:{form}} to", f"{high:{form}}"


def _signed(value: float | None) -> Cell:
    return () if value is None else (f"{value:+.2f}",)


def _rate(rate: WinRate | None) -> Cell:
    if not rate:
        return ()
    share, _, interval = str(rate).partition(" ")
    return (share, interval, *([rate.tied] if rate.ties else []))


def _taken(r: Record) -> str:
    return "best" if r.chosen["eval_best"] else "last"


def unbroken(text: str) -> Markup:
    """A text in which flags and names with hyphens stay on one line where it can hold them."""
    parts = re.split(r"(\S*-\S*)", text)
    return Markup("").join(
        Markup('<span class="word">{}</span>').format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def answers(r: Record) -> list[tuple[Row, Row]]:
    """Answers before and after, from the largest gain in reward to the largest loss."""
    pairs = sorted(_answered(r), key=lambda p: p[0]["reward"] - p[1]["reward"])
    return evenly(pairs, MOST_ANSWERS)


def examples(r: Record) -> list[tuple[Row, Row]]:
    """Answers before and after, to prompts drawn by key: nobody chose them."""
    pairs = _answered(r)
    drawn = permutation(r.config.run.seed, "examples", n=len(pairs)) if pairs else []
    return [pairs[i] for i in drawn[:EXAMPLES]]


def _answered(r: Record) -> list[tuple[Row, Row]]:
    if not r.chosen["step"]:
        return []
    before, after = r.answered(0), r.answered(r.chosen["step"])
    pairs = [(before[i], after[i]) for i in before if i in after]
    pairs = [p for p in pairs if None not in (p[0]["reward"], p[1]["reward"])]
    return pairs


def settings_table(r: Record) -> list[tuple[str, str, bool, str]]:
    """(field, value, whether it is not the default, help) of the configuration."""
    texts, values = setting_help(), flat_values(r.config)
    return [
        (s.flat, _text(values[s.flat]), values[s.flat] != s.default, texts[s.flat])
        for s in SETTINGS.values()
    ]


def training_command(r: Record) -> str:
    """What to type to train the run again, beside the first one."""
    words = ["mlx-grpo", "train"]
    values = flat_values(r.config)
    for s in SETTINGS.values():
        value = values[s.flat]
        if s.flat == "output":
            value = f"{r.config.run_directory}-again"
        elif value == s.default and s.flat != "seed":
            continue
        for one in value if s.flat in REPEATED else [value]:
            words += [flag_of(s.flat), _text(one)]
    return command(*words)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def title_of(runs: Sequence[Path]) -> str:
    """What the page is called."""
    names = [run.resolve().name for run in runs]
    return names[0] if len(names) == 1 else f"{len(names)} runs: {', '.join(names)}"
