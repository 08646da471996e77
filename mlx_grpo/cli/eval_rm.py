"""`mlx-grpo eval-rm`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import JsonFile, Quiet, check_json_file
from mlx_grpo.console.output import Console


def evaluate_reward_model(
    rm: Annotated[Path, typer.Argument(help="Directory of the reward model.")],
    pairs: Annotated[
        Path,
        typer.Option(
            help="Preference pairs: JSONL, JSON, CSV, Parquet, or a Hub data set as "
            "owner/name:split."
        ),
    ],
    actor_model: Annotated[
        Path | None, typer.Option(help="Model that a reward adapter was made for.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Field whose values get figures of their own, such as category; may be given "
            "several times."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Only pairs whose field `split` says so: train, valid or test.")
    ] = "",
    limit: Annotated[int, typer.Option(help="First pairs to use; 0 means all.", min=0)] = 0,
    max_length: Annotated[
        int,
        typer.Option(
            help="Pairs longer than this many tokens, prompt included, are skipped and counted.",
            min=1,
        ),
    ] = 2048,
    prompt_column: Annotated[
        str, typer.Option(help="Field that holds the prompt, if not `prompt` or `messages`.")
    ] = "",
    chosen_column: Annotated[
        str, typer.Option(help="Field that holds the preferred answer, if not `chosen`.")
    ] = "",
    rejected_column: Annotated[
        str, typer.Option(help="Field that holds the other answer, if not `rejected`.")
    ] = "",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure a reward model on preference pairs: accuracy, length rules, calibration."""
    from mlx_grpo.files.atomic import write_json
    from mlx_grpo.reward_modeling.evaluate import PairsWanted, evaluate_rm, show_evaluation

    if json_file:
        check_json_file(json_file)
    ui = Console(quiet)
    columns = {"prompt": prompt_column, "chosen": chosen_column, "rejected": rejected_column}
    wanted = PairsWanted(pairs, columns, split, limit, max_length, tuple(by or ()))
    with ui.working("scoring pairs"):
        found = evaluate_rm(rm, wanted, actor_model, ui.progress)
    show_evaluation(ui, found, wanted)
    if json_file:
        about = {"reward_model": str(rm), "file": str(pairs)}
        write_json(json_file, {**about, **found.to_json()})
