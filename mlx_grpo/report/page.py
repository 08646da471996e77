"""The words and tables of a report, and the page they stand on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment, StrictUndefined

from mlx_grpo.config.settings import REPEATED, SETTINGS, flag_of, flat_values
from mlx_grpo.config.sources import setting_help
from mlx_grpo.console.live import duration
from mlx_grpo.core.commands import command
from mlx_grpo.core.stats import WinRate
from mlx_grpo.report.charts import svg
from mlx_grpo.report.figures import figures
from mlx_grpo.report.health import Row
from mlx_grpo.report.record import Record, gold_names
from mlx_grpo.run.directory import resume_command

REFRESH_SECONDS = 30
EXAMPLES = 6


@dataclass(frozen=True)
class Figure:
    """A row of the table before and after."""

    name: str
    key: str
    form: str

    def text(self, row: Row) -> str:
        return number(row, self.key, self.form)


def render(records: Sequence[Record], title: str) -> str:
    """The page, complete in itself."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((files(__package__) / "page.html").read_text("utf-8"))
    return template.render(
        title=title,
        records=records,
        refresh=REFRESH_SECONDS if any(r.running for r in records) else 0,
        written=time.strftime("%Y-%m-%d %H:%M"),
        charts=[(chart, svg(chart)) for chart in figures(records)],
        rows=rows(records),
        summary=summary,
        status=status,
        pace=pace,
        going_on=going_on,
        wins=wins,
        judges={"reward": "reward", **{n: f"rewards/{n}" for n in gold_names(records)}},
        warnings=_warnings(records),
        number=number,
        over=over,
        examples=examples,
        settings=settings_table,
        command=training_command,
    )


def number(row: Row, key: str, form: str) -> str:
    """A figure, or what it is instead."""
    if key not in row:
        return ""
    return "not finite" if row[key] is None else format(row[key], form)


def status(r: Record) -> str:
    """How far a run is."""
    place = f"iteration {r.step} of {r.config.run.num_iterations}"
    if r.running:
        return f"running, {place}"
    return "finished" if r.finished else f"stopped at {place}"


def pace(r: Record) -> str:
    """Roughly how long it is from one page of a run to the next, once that is known."""
    if not r.iterations:
        return ""
    between = r.config.evaluation.every * fmean(row["time/iteration"] for row in r.iterations[-10:])
    return f", about every {duration(between + r.evaluations[-1].get('time/evaluate', 0.0))}"


def going_on(r: Record) -> str:
    """What to type to go on with a run."""
    return resume_command(r.run)


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
        said.append(f"Its answer has the higher reward on {_interval(rate)} of the prompts.")
    for name in r.config.gold_names:
        before, after = (e.get(f"eval_rewards/{name}/mean") for e in (first, now))
        if before is not None and after is not None:
            rate = r.wins(f"rewards/{name}")
            told = f", a better answer on {_interval(rate)} of the prompts" if rate else ""
            said.append(f"The gold judge {name} gives {after:.3f} (SFT model: {before:.3f}){told}.")
    perplexities = [number(e, "eval_perplexity", ".2f") for e in (now, first)]
    lengths = [number(e, "eval_completions/mean_length", ".0f") for e in (now, first)]
    said.append(
        f"The KL to the SFT model is {number(now, 'eval_kl', '.4f')} nats per token; the "
        f"perplexity of reference answers {perplexities[0]} (SFT model: {perplexities[1]}); an "
        f"answer has {lengths[0]} tokens (SFT model: {lengths[1]})."
    )
    return said


def _interval(rate: WinRate) -> str:
    low, high = rate.wilson()
    return f"{rate.share:.0%} (95 % interval {low:.0%} to {high:.0%})"


def _warnings(records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """(title, (run, figures) of each run it holds for, what to try)."""
    found = [(r.run.name, f) for r in records for f in r.findings]
    advice = {f.title: f.advice for _, f in found}
    return [
        (title, [(name, f.evidence) for name, f in found if f.title == title], text)
        for title, text in advice.items()
    ]


def wins(r: Record, key: str) -> str:
    """How often the run beats the SFT model, with a 95 % interval."""
    rate = r.wins(key)
    return str(rate) if rate else ""


def rows(records: Sequence[Record]) -> list[Figure]:
    """What the table has, of what the runs have."""
    judges = {f"eval_rewards/{name}/mean": name for name in gold_names(records)}
    table = [
        Figure("reward", "eval_reward", "+.3f"),
        *(Figure(f"gold judge: {name}", key, ".3f") for key, name in judges.items()),
        Figure("KL to the SFT model, nats per token", "eval_kl", ".4f"),
        Figure("perplexity of reference answers", "eval_perplexity", ".2f"),
        Figure("length, tokens", "eval_completions/mean_length", ".1f"),
        Figure("share of answers cut off", "eval_completions/clipped_ratio", ".0%"),
    ]
    return [f for f in table if any(f.key in r.chosen for r in records)]


def over(records: Sequence[Record], figure: Figure, which: str) -> str:
    """Mean and standard deviation over runs, `first` or `chosen` evaluation."""
    rows = [r.evaluations[0] if which == "first" else r.chosen for r in records]
    values = [row[figure.key] for row in rows if row.get(figure.key) is not None]
    if not values:
        return ""
    deviation = stdev(values) if len(values) > 1 else 0.0
    form = figure.form.replace("+", "")
    return f"{fmean(values):{figure.form}} ± {deviation:{form}}"


def examples(r: Record) -> list[tuple[Row, Row]]:
    """Answers before and after, from the largest gain in reward to the largest loss."""
    if not r.chosen["step"]:
        return []
    before, after = r.answered(0), r.answered(r.chosen["step"])
    pairs = [(before[i], after[i]) for i in before if i in after]
    pairs = [p for p in pairs if None not in (p[0]["reward"], p[1]["reward"])]
    pairs.sort(key=lambda p: p[0]["reward"] - p[1]["reward"])
    count = min(EXAMPLES, len(pairs))
    return [pairs[round(i * (len(pairs) - 1) / max(1, count - 1))] for i in range(count)]


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
