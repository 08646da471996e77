"""Before and after, side by side: the SFT model and a run's adapter on held-out prompts.

Both answer at --eval-temperature, greedily by default; the KL is measured on samples.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import TrainConfig, decoding, judge_label, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import permutation
from mlx_grpo.core.stats import win_rate
from mlx_grpo.core.types import Completion
from mlx_grpo.data.leaks import chosen_by_warnings
from mlx_grpo.data.prompts import read_prompts
from mlx_grpo.evaluation.judge import Verdicts
from mlx_grpo.grpo.evaluate import Evaluation, Evaluator
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import load_adapter
from mlx_grpo.rewards.functions import PYTHON
from mlx_grpo.run.directory import chosen_adapter, run_settings
from mlx_grpo.training.setup import load_evaluator, training_rows, without_given

SHOWN = 3
Scores = tuple[Sequence[float], Sequence[float]]
"""Of each answer: (before, after)."""


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same prompts, at one temperature, with the same random numbers."""

    before: Evaluation
    after: Evaluation
    adapter: str
    prompts: str
    """File."""
    judges: Sequence[str] = ()
    """Sources of a reward that were measured and never trained on."""
    seed: int = 42
    """Draws the examples."""
    samples: tuple[Evaluation, Evaluation] | None = None
    """(before, after) with several sampled answers per prompt, where these were asked for."""


def compare_run(
    run: Path,
    prompts: Path | None,
    adapter: str,
    ui: Console,
    limit: int = 0,
    judges: Sequence[str] = (),
    columns: tuple[str, str] = ("", ""),
    temperature: float | None = None,
    samples: int = 0,
) -> Comparison:
    """Evaluate the SFT model and an adapter of a run: `best`, `final`, or "" for best if there.

    Of the run's own held-out prompts those are used that did not choose best/: the first file of
    --test-prompts, or those of --eval-prompts that --eval-limit has left. Where the prompts chose
    as well, a warning says so.

    Args:
        limit: first prompts to use; 0 means all.
        judges: functions to measure by beside the run's own, as --eval-reward names them.
        columns: what `prompt` and `response` are called in `prompts`.
        temperature: of the answers; None: the run's --eval-temperature.
        samples: answers per prompt for pass@k; 0: the run's --num-generations-eval.

    Raises:
        InputError: no run, no such adapter, or its inputs are gone.
    """
    config = own = run_settings(run)
    measured = tuple(dict.fromkeys((*config.evaluation.rewards, *judges)))
    count = samples or own.evaluation.num_generations
    config = with_settings(
        config, eval_limit=limit, eval_reward=measured, num_generations_eval=count
    )
    tests = own.evaluation.tests
    skip = 0 if prompts or tests else own.evaluation.limit
    if not_here := [spec for spec in config.reward.functions if spec.startswith(PYTHON)]:
        config = without_given(config)
        names = ", ".join(spec.removeprefix(PYTHON) for spec in not_here)
        ui.warn(f"{run}: {names} was given from Python and is left out here; see --eval-reward")
    directory = chosen_adapter(run, adapter)
    if prompts:
        config = with_settings(
            config,
            eval_prompts=str(prompts),
            prompt_column=columns[0],
            response_column=columns[1],
        )
    elif tests:
        config = with_settings(config, eval_prompts=tests[0])
    with ui.working("loading"):
        # under the names of its own columns, not those of `prompts`
        evaluator = load_evaluator(config, ui, trained=lambda: training_rows(own), skip=skip)
        backbone = evaluator.backbone
        actor = load_adapter(backbone.model, directory)
    if directory.name == "best":
        _warn_of_choosing(own, config, {p.id for p in evaluator.prompts}, ui)
    heat = config.evaluation.temperature if temperature is None else temperature
    ui.say(
        f"comparing {directory} with {config.model.actor}, {len(evaluator.prompts)} prompts, "
        f"{decoding(heat)} answers"
    )
    policy = Decoder(actor, evaluator.reference.sizes)
    with closing(evaluator.rewards):
        with ui.working("evaluating the SFT model"):
            before, drawn_before = _evaluated(evaluator, evaluator.reference, heat, ui)
        with ui.working("evaluating the adapter"):
            after, drawn_after = _evaluated(evaluator, policy, heat, ui)
    file, seed, judged = config.evaluation.prompts, config.run.seed, config.gold_names
    drawn = (drawn_before, drawn_after) if drawn_before and drawn_after else None
    return Comparison(before, after, str(directory), file, judged, seed, drawn)


def _evaluated(
    evaluator: Evaluator, policy: Decoder, temperature: float, ui: Console
) -> tuple[Evaluation, Evaluation | None]:
    """(on the answers that are shown, on several samples per prompt where they are asked for)."""
    if evaluator.sampling.k == 1:
        return evaluator.at(policy, temperature, ui.progress), None
    drawn = evaluator(policy, ui.progress)
    return evaluator.shown(policy, drawn, temperature, ui.progress), drawn


def _warn_of_choosing(own: TrainConfig, config: TrainConfig, asked: set[str], ui: Console) -> None:
    """Warn if prompts that are compared on have chosen best/."""
    file, chose_file = config.evaluation.prompts, own.evaluation.prompts
    judging = [r for r in read_prompts(Path(file), config.columns) if r.id in asked]
    try:
        chose = read_prompts(Path(chose_file), own.columns)[: own.evaluation.limit or None]
    except InputError as e:
        ui.warn(f"cannot check whether these prompts chose best/: {e}")
        return
    for warning in chosen_by_warnings(file, judging, chose_file, chose):
        ui.warn(warning)


def contests(comparison: Comparison) -> dict[str, Scores]:
    """Everything that gave each answer a number: (scores before, scores after)."""
    before, after = comparison.before, comparison.after
    found: dict[str, Scores] = {"reward": (before.rewards, after.rewards)}
    for name, scores in before.by_source.items():
        both = [
            (b, a)
            for b, a in zip(scores, after.by_source[name], strict=True)
            if b is not None and a is not None  # it applies to both answers
        ]
        if not both:
            continue
        sides: Scores = ([b for b, _ in both], [a for _, a in both])
        if any(list(s) != list(e.rewards) for s, e in zip(sides, (before, after), strict=True)):
            found[name] = sides  # else it is the reward itself, as the only one that counts
    return found


def comparison_json(comparison: Comparison, verdicts: Verdicts | None) -> dict[str, Any]:
    """All of it as JSON: the figures of each side, and who wins by what."""
    wins = {name: _counts(*scores) for name, scores in contests(comparison).items()}
    if verdicts:
        wins["judge"] = {
            **_counts(*_sides(verdicts)),
            "disagreements": verdicts.disagreements,
            "unreadable": verdicts.unreadable,
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
    }


def _counts(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Of the policy after: prompts won, tied and lost, their share (ties count half), its Wilson
    interval."""
    rate = win_rate(before, after)
    won = sum(b < a for b, a in zip(before, after, strict=True))
    return {
        "wins": won,
        "ties": rate.ties,
        "losses": rate.prompts - won - rate.ties,
        "share": rate.share,
        "interval": rate.wilson(),
    }


def _sides(verdicts: Verdicts) -> Scores:
    """Verdicts as if they were scores."""
    return [1 - o for o in verdicts.outcomes], verdicts.outcomes


def show_comparison(ui: Console, comparison: Comparison, verdicts: Verdicts | None = None) -> None:
    """The table, and some answers side by side."""
    before, after = comparison.before, comparison.after
    label = {name: judge_label(name) for name in comparison.judges}
    rows = [
        _contest(label.get(name, name), f"{_mean(old):+.3f}", f"{_mean(new):+.3f}", old, new)
        for name, (old, new) in contests(comparison).items()
    ]
    if verdicts:
        sides = _sides(verdicts)
        won = _counts(*sides)
        rows.append(_contest("judge", f"{won['losses']} wins", f"{won['wins']} wins", *sides))
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


def _contest(
    name: str, cell: str, other: str, old: Sequence[float], new: Sequence[float]
) -> tuple[str, str, str, str]:
    rate = win_rate(old, new)
    return f"{name} ({rate.tied})" if rate.ties else name, cell, other, str(rate)


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
