"""Before and after, side by side: the SFT model and a run's adapter on held-out prompts.

Both answer at --eval-temperature, greedily by default; the KL is measured on samples.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from mlx_grpo.config.settings import TrainConfig, decoding, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Prompt
from mlx_grpo.data.leaks import chosen_by_warnings
from mlx_grpo.data.prompts import read_prompts
from mlx_grpo.grpo.evaluate import Evaluation, Evaluator
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import load_adapter
from mlx_grpo.rewards.functions import PYTHON
from mlx_grpo.run.directory import chosen_adapter, other_model, run_settings
from mlx_grpo.training.held_out import choosing_rows
from mlx_grpo.training.setup import load_evaluator, training_rows, without_given

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
    by: str = ""
    """Field of the prompts' rows by whose values the wins are told apart as well."""

    @property
    def strata(self) -> dict[str, list[int]]:
        """Places of the prompts by the value of `by`; none without one."""
        asked = [g.prompt for g in self.after.groups]
        return strata(self.prompts, asked, self.by) if self.by else {}


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
    by: str = "",
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
        by: field of the prompts' rows by whose values the wins are told apart as well.

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
    if changed := other_model(run, backbone.path):
        ui.warn(changed)
    if directory.name == "best":
        _warn_of_choosing(own, config, {p.id for p in evaluator.prompts}, ui)
    if by:
        strata(config.evaluation.prompts, evaluator.prompts, by)  # before minutes are spent
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
    for side in (before, after):
        for name, count in _no_numbers(side).items():
            ui.warn(f"{name}: {count} scores are NaN or infinite; their prompts are left out")
    file, seed, judged = config.evaluation.prompts, config.run.seed, config.gold_names
    drawn = (drawn_before, drawn_after) if drawn_before and drawn_after else None
    return Comparison(before, after, str(directory), file, judged, seed, drawn, by)


def _no_numbers(evaluation: Evaluation) -> dict[str, int]:
    """How many scores of each source are NaN or infinite, where any are."""
    sources = {"reward": evaluation.rewards, **evaluation.by_source}
    counts = {
        name: sum(score is not None and not _is_number(score) for score in scores)
        for name, scores in sources.items()
    }
    return {name: count for name, count in counts.items() if count}


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
    judging = [
        r
        for r in read_prompts(Path(file), config.columns, config.data.system_prompt)
        if r.id in asked
    ]
    try:
        chose = choosing_rows(own)
    except InputError as e:
        ui.warn(f"cannot check whether these prompts chose best/: {e}")
        return
    acting = bool(config.rollout.environment)
    for warning in chosen_by_warnings(file, judging, chose_file, chose, acting):
        ui.warn(warning)


def strata(file: str, prompts: Sequence[Prompt], field: str) -> dict[str, list[int]]:
    """Places of the prompts of a file by the value that a field of their rows has.

    Raises:
        InputError: a row without the field.
    """
    found: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if field not in prompt.fields:
            raise InputError(
                f"{file}: row '{prompt.id}' has no field '{field}'; add it, or give another --by"
            )
        found.setdefault(str(prompt.fields[field]), []).append(place)
    return dict(sorted(found.items()))


def contests(comparison: Comparison, places: Sequence[int] | None = None) -> dict[str, Scores]:
    """Everything that gave each answer a number: (scores before, scores after).

    Args:
        places: of the prompts that count; None: all.

    Raises:
        InputError: no prompt has a reward that is a finite number on both sides.
    """
    before, after = comparison.before, comparison.after
    at = range(len(before.rewards)) if places is None else places
    found: dict[str, Scores] = {"reward": _on_both_sides(before.rewards, after.rewards, at)}
    if not found["reward"][0]:
        raise InputError("no prompt has a reward that is a finite number on both sides")
    for name, scores in before.by_source.items():
        sides = _on_both_sides(scores, after.by_source[name], at)
        if not sides[0]:
            continue
        if any(list(s) != list(r) for s, r in zip(sides, found["reward"], strict=True)):
            found[name] = sides  # else it is the reward itself, as the only one that counts
    return found


def _on_both_sides(
    before: Sequence[float | None], after: Sequence[float | None], places: Sequence[int]
) -> Scores:
    """The scores of the prompts where there is a finite number before and after."""
    pairs = [(before[i], after[i]) for i in places]
    both = [(b, a) for b, a in pairs if _is_number(b) and _is_number(a)]
    return [b for b, _ in both], [a for _, a in both]


def _is_number(score: float | None) -> TypeGuard[float]:
    return score is not None and math.isfinite(score)
