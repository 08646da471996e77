"""`mlx-grpo eval`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import JsonFile, Quiet, check_json_file, check_needs
from mlx_grpo.console.output import Console

DEFAULT_MODEL = "default_model"


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Held-out prompts instead of the run's own (see --test-prompts)."),
    ] = None,
    prompt_column: Annotated[
        str,
        typer.Option(help="Field of --prompts that holds the prompt, if not prompt or messages."),
    ] = "",
    response_column: Annotated[
        str,
        typer.Option(help="Field of --prompts that holds the reference answer, if not response."),
    ] = "",
    limit: Annotated[int, typer.Option(help="First prompts to use; 0 means all.", min=0)] = 0,
    adapter: Annotated[str, typer.Option(help="best or final (default: best if there).")] = "",
    eval_temperature: Annotated[
        float | None,
        typer.Option(
            help="Temperature of the answers that are compared; 0 takes the likeliest token each "
            "time (default: the run's own, 0 unless set). The KL is always measured on samples.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    num_generations_eval: Annotated[
        int | None,
        typer.Option(
            help="Also sample so many answers per prompt, for mean@n and pass@k of rewards that "
            "are 0 or 1 (default: the run's own).",
            min=1,
            show_default=False,
        ),
    ] = None,
    eval_reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Also measure with this function, module:function or "
            "file.py:function; may be given several times."
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="FIELD",
            help="Also give the wins for each value of a field of the prompts' rows, such as "
            "category.",
        ),
    ] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also ask a model behind an OpenAI-compatible endpoint, like "
            "http://localhost:8080/v1, twice per prompt; the key is taken from OPENAI_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[
        str,
        typer.Option(
            help=f"Name of the model there (default: {DEFAULT_MODEL}, mlx_lm.server's own).",
        ),
    ] = "",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare a run with the SFT model on held-out prompts: reward, KL, perplexity, wins."""
    from mlx_grpo.evaluation.compare import compare_run
    from mlx_grpo.evaluation.judge import Judge, compare_answers
    from mlx_grpo.evaluation.table import comparison_json, show_comparison
    from mlx_grpo.files.atomic import write_json

    check_needs("--prompts", prompts, prompt_column=prompt_column, response_column=response_column)
    check_needs("--judge", judge, judge_model=judge_model)
    if json_file:
        check_json_file(json_file)
    ui = Console(quiet)
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    asked = Judge(judge, judge_model or DEFAULT_MODEL, key) if judge else None
    if asked:
        asked.ask("Reply with the letter A.")  # before minutes are spent on answers
    columns = (prompt_column, response_column)
    comparison = compare_run(
        run,
        prompts,
        adapter,
        ui,
        limit,
        eval_reward or (),
        columns,
        eval_temperature,
        num_generations_eval or 0,
        by,
    )
    verdicts = None
    try:
        if asked:
            with ui.working("asking the judge"):
                before, after = comparison.before.groups, comparison.after.groups
                verdicts = compare_answers(asked, before, after, ui.progress)
    finally:  # a judge that fails takes nothing else with it
        show_comparison(ui, comparison, verdicts)
        if json_file:
            write_json(json_file, comparison_json(comparison, verdicts))
