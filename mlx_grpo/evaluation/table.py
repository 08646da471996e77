"""A comparison in tables and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_grpo.config.settings import decoding, judge_label
from mlx_grpo.console.output import Console
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.stats import cohens_d, win_rate
from mlx_grpo.core.types import Completion
from mlx_grpo.evaluation.compare import Comparison, Scores, contests
from mlx_grpo.evaluation.judge import Verdicts

SHOWN = 3


def comparison_json(comparison: Comparison, verdicts: Verdicts | None) -> dict[str, Any]:
    """All of it as JSON: the figures of each side, and who wins by what."""
    wins = {name: _counts(*scores) for name, scores in contests(comparison).items()}
    if verdicts:
        wins["judge"] = {
            **_counts(*_sides(verdicts)),
            "disagreements": verdicts.disagreements,
            "unreadable": verdicts.unreadable,
        }
    groups = {
        value: {
            "count": len(places),
            "wins": {n: _counts(*s) for n, s in _judged(comparison, verdicts, places).items()},
        }
        for value, places in comparison.strata.items()
    }
    return {
        "adapter": comparison.adapter,
        "prompts": {"file": comparison.prompts, "count": len(comparison.before.groups)},
        "temperature": comparison.after.temperature,
        "sft": comparison.before.metrics(),
        "grpo": comparison.after.metrics(),
        **(
            {"samples": dict(zip(("sft", "grpo"), (e.metrics() for e in drawn), strict=True))}
            if (drawn := comparison.samples)
            else {}
        ),
        "wins": wins,
        **({"by": {comparison.by: groups}} if groups else {}),
    }


def _counts(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Of the policy after: prompts won, tied and lost, their share (ties count half), its Wilson
    interval, the effect size."""
    rate = win_rate(before, after)
    won = sum(b < a for b, a in zip(before, after, strict=True))
    return {
        "wins": won,
        "ties": rate.ties,
        "losses": rate.prompts - won - rate.ties,
        "tie_rate": rate.ties / rate.prompts,
        "share": rate.share,
        "interval": rate.wilson(),
        "cohens_d": cohens_d(before, after),
    }


def _sides(verdicts: Verdicts) -> Scores:
    """Verdicts as if they were scores."""
    return [1 - o for o in verdicts.outcomes], verdicts.outcomes


def _judged(
    comparison: Comparison, verdicts: Verdicts | None, places: Sequence[int]
) -> Mapping[str, Scores]:
    """The contests of some prompts, the judge's verdicts among them."""
    found = contests(comparison, places)
    if verdicts:
        before, after = _sides(verdicts)
        found["judge"] = [before[i] for i in places], [after[i] for i in places]
    return found


def show_comparison(ui: Console, comparison: Comparison, verdicts: Verdicts | None = None) -> None:
    """The table, the wins by a field of the prompts' rows if there is one to go by, and some
    answers side by side."""
    before, after = comparison.before, comparison.after
    label = {name: judge_label(name) for name in comparison.judges}
    rows = [
        _contest(label.get(name, name), f"{_mean(old):+.3f}", f"{_mean(new):+.3f}", old, new)
        for name, (old, new) in contests(comparison).items()
    ]
    if verdicts:
        sides = _sides(verdicts)
        won = _counts(*sides)
        cells = (f"{won['losses']} wins", f"{won['wins']} wins")
        rows.append(_contest("judge", *cells, *sides, f", {won['tie_rate']:.0%}"))
    rows += [
        ("KL to the SFT model, nats/token", f"{before.kl:.4f}", f"{after.kl:.4f}", ""),
        (
            "perplexity of reference answers",
            f"{before.perplexity:.2f}",
            f"{after.perplexity:.2f}",
            "",
        ),
        *_rates(comparison),
        ("length, tokens", f"{before.mean_length:.1f}", f"{after.mean_length:.1f}", ""),
        ("answers that end by themselves", f"{before.finished:.0%}", f"{after.finished:.0%}", ""),
    ]
    count = len(before.groups)
    ui.table(
        f"{count} held-out prompts, {decoding(after.temperature)} answers; KL on samples",
        ("", "SFT model", "after GRPO", "after wins (95 % interval)"),
        rows,
    )
    if comparison.by:
        _show_strata(ui, comparison, verdicts)
    ui.table(
        "Answers to prompts drawn at random",
        ("prompt", "SFT model", "after GRPO"),
        _answers(comparison),
        lines=True,
    )
    if verdicts and verdicts.unreadable:
        ui.warn(
            f"{verdicts.unreadable} of the judge's {2 * count} replies were neither A, B nor T and "
            "count as ties"
        )


def _rates(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """`mean@n` and `pass@k` of rewards that are 0 or 1."""
    if not comparison.samples:
        return []
    before, after = (e.metrics("") for e in comparison.samples)
    names = [name for name in before if "@" in name and name in after]
    return [
        (f"{rate} of {source}, sampled", f"{before[name]:.1%}", f"{after[name]:.1%}", "")
        for name in names
        for _, source, rate in [name.split("/")]
    ]


def _show_strata(ui: Console, comparison: Comparison, verdicts: Verdicts | None) -> None:
    label = {name: judge_label(name) for name in comparison.judges}
    places, by = comparison.strata, comparison.by
    found = {value: _judged(comparison, verdicts, at) for value, at in places.items()}
    names = list(dict.fromkeys(name for judged in found.values() for name in judged))
    rows = [
        (
            f"{value} ({len(places[value])})",
            *(str(win_rate(*judged[n])) if n in judged else "" for n in names),
        )
        for value, judged in found.items()
    ]
    columns = (by, *(label.get(name, name) for name in names))
    ui.table(f"After GRPO wins, by {by} (prompts); 95 % intervals", columns, rows)


def _contest(
    name: str, cell: str, other: str, old: Sequence[float], new: Sequence[float], more: str = ""
) -> tuple[str, str, str, str]:
    """A row of the table; `more` follows the number of ties."""
    rate = win_rate(old, new)
    return f"{name} ({rate.tied}{more})" if rate.ties else name, cell, other, str(rate)


def _answers(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Some of both, drawn by key: nobody chose them."""
    before, after = comparison.before.groups, comparison.after.groups
    drawn = permutation(comparison.seed, "examples", n=len(before))[:SHOWN] if before else []
    return [
        (
            before[i].prompt.messages[-1]["content"],
            _shown(before[i].completions[0]),
            _shown(after[i].completions[0]),
        )
        for i in drawn
    ]


def _shown(completion: Completion) -> str:
    return completion.text.strip() + (" [cut off]" if completion.finish_reason == "length" else "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
