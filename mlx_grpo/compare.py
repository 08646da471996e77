"""Before and after, side by side: the SFT model and a run's adapter on held-out prompts."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_grpo.config_sources import build_config
from mlx_grpo.console import Console
from mlx_grpo.errors import InputError
from mlx_grpo.evaluate import Evaluation, win_rate
from mlx_grpo.models.lora import load_adapter
from mlx_grpo.models.stages import Stages
from mlx_grpo.parts import load_evaluator
from mlx_grpo.rubric import judge
from mlx_grpo.run_directory import CONFIG, chosen_adapter, is_run
from mlx_grpo.types import Completion

SHOWN = 3


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same prompts with the same random numbers."""

    before: Evaluation
    after: Evaluation


def compare_run(run: Path, prompts: Path | None, adapter: str, ui: Console) -> Comparison:
    """Evaluate the SFT model and an adapter of a run: `best`, `final`, or "" for best if there.

    Raises:
        InputError: no run, no such adapter, or its inputs are gone.
    """
    if not is_run(run):
        raise InputError(f"{run}: no run here (config.toml is missing)")
    directory = chosen_adapter(run, adapter)
    config = replace(build_config(run / CONFIG), eval_limit=0)
    if prompts:
        config = replace(config, eval_prompts=str(prompts))
    with ui.working("loading"):
        evaluator = load_evaluator(config, ui)
        backbone = evaluator.backbone
        actor = load_adapter(backbone.model, directory)
    ui.say(f"comparing {directory} with {config.actor_model}, {len(evaluator.prompts)} prompts")
    with closing(evaluator.rewards):
        with ui.working("evaluating the SFT model"):
            before = evaluator(evaluator.reference, ui.progress)
        with ui.working("evaluating the adapter"):
            after = evaluator(Stages(actor), ui.progress)
    return Comparison(before, after)


def rubric_scores(evaluation: Evaluation) -> list[float]:
    """The rubric's mark of each answer."""
    return [
        judge(g.prompt.messages[-1]["content"], c.text, c.finish_reason).score
        for g in evaluation.groups
        for c in g.completions
    ]


def show_comparison(ui: Console, comparison: Comparison, rubric: bool) -> None:
    """The table, and some answers side by side."""
    before, after = comparison.before, comparison.after
    rows: list[tuple[str, ...]] = [
        (
            "reward",
            f"{before.reward:+.3f}",
            f"{after.reward:+.3f}",
            _wins(before.rewards, after.rewards),
        )
    ]
    if rubric:
        marks = rubric_scores(before), rubric_scores(after)
        rows.append(
            ("gold rubric (never trained on)", *(f"{_mean(m):.3f}" for m in marks), _wins(*marks))
        )
    rows += [
        ("KL to the SFT model, nats/token", f"{before.kl:.4f}", f"{after.kl:.4f}", ""),
        (
            "perplexity of reference answers",
            f"{before.perplexity:.2f}",
            f"{after.perplexity:.2f}",
            "",
        ),
        ("length, tokens", f"{before.mean_length:.1f}", f"{after.mean_length:.1f}", ""),
        ("answers that end by themselves", f"{before.finished:.0%}", f"{after.finished:.0%}", ""),
    ]
    count = len(before.groups)
    ui.table(
        f"{count} held-out prompts",
        ("", "SFT model", "after GRPO", "after wins (95 % interval)"),
        rows,
    )
    ui.table("Answers", ("prompt", "SFT model", "after GRPO"), _answers(before, after), lines=True)


def _answers(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    pairs = list(zip(before.groups, after.groups, strict=True))
    step = max(1, len(pairs) // SHOWN)
    return [
        (b.prompt.messages[-1]["content"], _shown(b.completions[0]), _shown(a.completions[0]))
        for b, a in pairs[step // 2 :: step][:SHOWN]
    ]


def _shown(completion: Completion) -> str:
    return completion.text.strip() + (" [cut off]" if completion.finish_reason == "length" else "")


def _wins(before: Sequence[float], after: Sequence[float]) -> str:
    rate = win_rate(before, after)
    low, high = rate.wilson()
    return f"{rate.share:.0%} ({low:.0%} to {high:.0%})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
