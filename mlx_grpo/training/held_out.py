"""The files of held-out prompts: read, checked for leaks, and given to an evaluator.

The first one, --eval-prompts, chooses best/; those of --test-prompts only measure.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Group, Prompt
from mlx_grpo.data.leaks import chosen_by_warnings, leak_warnings
from mlx_grpo.data.prompts import PromptRow, read_prompts, tokenize_prompts
from mlx_grpo.grpo.evaluate import Evaluator, reference_answers, writing
from mlx_grpo.grpo.learner import sampling
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.turns import Acting
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.plan.planner import Planner


def read_tests(
    config: TrainConfig, trained: Sequence[PromptRow], ui: Console
) -> dict[str, list[PromptRow]]:
    """The rows of each file of --test-prompts, by its name in the metrics; warns of prompts that
    are trained on or choose best/ as well.

    Raises:
        InputError: a bad row, or none.
    """
    if not (names := config.evaluation.test_names):
        return {}
    chose_file, chose = config.evaluation.prompts, choosing_rows(config)
    acting = bool(config.rollout.environment)
    found = {}
    for name, file in names.items():
        rows = found[name] = read_prompts(Path(file), config.columns, config.data.system_prompt)
        for warning in (
            *leak_warnings(config.data.prompts, trained, file, rows, acting),
            *chosen_by_warnings(file, rows, chose_file, chose, acting),
        ):
            ui.warn(warning)
    return found


def choosing_rows(config: TrainConfig) -> list[PromptRow]:
    """The rows of --eval-prompts that choose best/.

    Raises:
        InputError: no such file, or a bad row.
    """
    file, system = Path(config.evaluation.prompts), config.data.system_prompt
    return read_prompts(file, config.columns, system)[: config.evaluation.limit or None]


def sampling_held_out(planner: Planner, prompts: Sequence[Prompt], k: int) -> Sampling:
    """How `k` answers to each held-out prompt are sampled: as many rows at once as fit into the
    memory of an iteration, or as were asked for. With an environment no more rows than an iteration
    has, because environments can be expensive."""
    how, asked = sampling(planner.config, k, planner.plan().choice), planner.config.rollout
    if asked.environment or asked.decode_rows or not prompts:
        return how
    longest = max(len(prompt.token_ids) for prompt in prompts)
    return replace(how, decode_rows=planner.held_out_rows(len(prompts), longest, k))


def asking(
    evaluator: Evaluator,
    planner: Planner,
    file: str,
    rows: Sequence[PromptRow],
    ui: Console,
    skip: int = 0,
) -> Evaluator:
    """The same evaluator with the prompts of a file.

    Args:
        skip: first prompts to leave out, unless no others are there.
    """
    backbone, config = evaluator.backbone, planner.config

    def ask(missing: Sequence[Prompt]) -> list[Group]:
        model, tokenizer, stop_ids = backbone.model, backbone.tokenizer, backbone.stop_ids
        one_each = sampling_held_out(planner, missing, 1)
        return rollout(
            model,
            tokenizer,
            stop_ids,
            missing,
            one_each,
            config.run.seed,
            "references",
            on_token=writing("reference answers", one_each, ui.progress),
        )

    limit = config.data.max_prompt_length
    held_out = tokenized(file, rows, backbone, limit, ui, evaluator.acting)
    prompts = (held_out[skip:] or held_out)[: config.evaluation.limit or None]
    answers = reference_answers(backbone.tokenizer, prompts, ask)
    how = sampling_held_out(planner, prompts, config.evaluation.num_generations)
    return replace(evaluator, prompts=tuple(prompts), answers=answers, sampling=how)


def warn_of_leaks(
    config: TrainConfig,
    trained: Callable[[], Sequence[PromptRow]],
    held_out: Sequence[PromptRow],
    ui: Console,
) -> None:
    """Warn of held-out prompts that are trained on, and of files with few different ones."""
    try:
        found = trained()
    except InputError as e:  # an evaluation can do without them
        ui.warn(f"cannot check whether held-out prompts were trained on: {e}")
        return
    train_file, file = config.data.prompts, config.evaluation.prompts
    acting = bool(config.rollout.environment)
    for warning in leak_warnings(train_file, found, file, held_out, acting):
        ui.warn(warning)


def tokenized(
    file: str,
    rows: Sequence[PromptRow],
    backbone: Backbone,
    limit: int,
    ui: Console,
    acting: Acting | None = None,
) -> list[Prompt]:
    """The prompts of a file, with the tools of an environment; those that are too long are counted
    in a warning."""
    prompts, too_long = tokenize_prompts(
        Path(file),
        rows,
        backbone.tokenizer,
        limit,
        partial(ui.progress, f"tokenizing {file}"),
        acting.tools if acting else None,
    )
    if too_long:
        ui.warn(f"{file}: {too_long} prompts longer than {limit} tokens are skipped")
    return prompts
