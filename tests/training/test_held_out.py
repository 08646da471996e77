"""Several files of held-out prompts, and several answers to each of their prompts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Prompt
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.evaluation.table import comparison_json, show_comparison
from mlx_grpo.plan.memory import Plan, RewardFootprint, predict
from mlx_grpo.plan.planner import Planner
from mlx_grpo.report.record import read
from mlx_grpo.report.write import write_report
from mlx_grpo.run import log
from mlx_grpo.training.held_out import sampling_held_out
from mlx_grpo.training.loop import train
from tests.helpers.shapes import GEMMA_2B
from tests.helpers.tiny import write_jsonl

QUIET = Console(quiet=True)
RIGHT = "def right(completion_ids): return [float(sum(ids) % 2) for ids in completion_ids]"


@pytest.fixture(scope="module")
def run(run_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one iteration, rewarded with 0 or 1, with two test files and four answers a prompt."""
    root = tmp_path_factory.mktemp("held-out")
    (root / "rewards.py").write_text(RIGHT)
    held_out = json.loads(Path(run_settings["eval_prompts"]).read_text().splitlines()[0])
    files = {
        "hard": [{"prompt": "what is salt?"}, {"prompt": "what is moss?"}],
        "seen": [{"prompt": held_out["prompt"]}],
    }
    for name, rows in files.items():
        write_jsonl(root / f"{name}.jsonl", rows)
    config = train_config(
        **{**run_settings, "rm_model": "none", "num_iterations": 1, "kl_targets": (5.0,)},
        reward=(f"{root / 'rewards.py'}:right",),
        output=str(root / "run"),
        test_prompts=tuple(str(root / f"{name}.jsonl") for name in files),
        num_generations_eval=4,
        metric_for_best_model="rewards/right/pass@2",
    )
    assert train(config, QUIET)
    return root / "run"


def test_each_test_file_is_measured_under_its_name_and_chooses_nothing(run: Path) -> None:
    rows = [r for r in log.read(run / log.METRICS) if "eval_reward" in r]
    assert len(rows) == 2
    for row in rows:
        assert {"eval_hard_reward", "eval_hard_kl", "eval_seen_rewards/right/mean@4"} < row.keys()
        assert row["eval_rewards/right/pass@4"] >= row["eval_rewards/right/pass@2"]
        assert row["eval_rewards/right/mean@4"] == pytest.approx(row["eval_reward"])
    record = read(run, running=False)
    assert record.chosen["eval_best"] and record.config.evaluation.best_metric in rows[1]
    assert set(record.answered(1, "hard")) == {"1", "2"} and len(record.answered(1)) == 3


def test_the_report_has_each_file_with_its_win_rate(run: Path) -> None:
    said = write_report([run]).read_text()
    for name in ("hard", "seen"):
        assert f"reward, {name}" in said and f"Reward on {name}" in said
        assert f"greedy answers, {name}" in said.replace("</span>", "")
    assert "pass@4 of right" in said


def test_a_run_is_compared_on_its_first_test_file_with_pass_rates(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = compare_run(run, None, "", Console())
    assert compared.prompts.endswith("hard.jsonl") and len(compared.after.groups) == 2
    show_comparison(Console(), compared)
    assert "pass@4 of right, sampled" in capsys.readouterr().out
    written = comparison_json(compared, None)
    assert written["temperature"] == 0 and "eval_rewards/right/mean@4" in written["samples"]["grpo"]


def test_a_test_prompt_that_also_chooses_best_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_settings(read(run, False).config, output=str(tmp_path / "again"))
    assert train(config, QUIET, dry_run=True)
    assert "seen.jsonl: 1 of its 1 prompts choose best/ as well" in capsys.readouterr().err


def test_two_test_files_of_one_name_are_refused(train_arguments: dict[str, Any]) -> None:
    config = train_config(**train_arguments, test_prompts=("a/x.jsonl", "b/x.csv"))
    with pytest.raises(InputError, match="--test-prompts: must be files of different names"):
        train(config, QUIET)


def planner_of(limit: float, **settings: Any) -> tuple[Planner, Plan]:
    """For Gemma-2B in so many bytes; on a Mac unless its weights are to be expanded."""
    config = train_config(memory_limit=f"{limit / 1e9}GB", **settings)
    planner = Planner(config, GEMMA_2B, RewardFootprint(), here=False, ranks=1)
    return planner, planner.plan()


def prompts_of(count: int, tokens: int) -> list[Prompt]:
    return [Prompt(str(i), (), (1,) * (tokens - i % 3)) for i in range(count)]


@pytest.mark.parametrize(
    "limit, weights", [(2.5e9, "auto"), (3.5e9, "auto"), (8e9, "auto"), (16e9, "dense")]
)
@pytest.mark.parametrize("k", [1, 16])
def test_held_out_answers_are_decoded_together_within_the_memory_of_an_iteration(
    limit: float, weights: str, k: int
) -> None:
    planner, plan = planner_of(limit, weights=weights)
    assert plan.choice.dense == (weights == "dense")
    rows = sampling_held_out(planner, prompts_of(200, 60), k).decode_rows
    work = replace(planner.work, prompts=200, k=k, prompt_tokens=60)
    choice = replace(plan.choice, decode_rows=rows)
    held = predict(GEMMA_2B, RewardFootprint(), work, choice, plan.limit).stages["rollout"]
    assert plan.fits and held <= plan.peak and rows >= k
    more = predict(GEMMA_2B, RewardFootprint(), work, replace(choice, decode_rows=4 * rows), 0)
    assert rows == 200 * k or more.stages["rollout"] > plan.peak


@pytest.mark.parametrize("limit", [1.6e9, 2.0e9])
def test_where_no_iteration_fits_an_evaluation_takes_no_more_than_it_must(limit: float) -> None:
    planner, plan = planner_of(limit)
    assert not plan.fits and plan.peak > plan.limit
    sizes, work = plan.choice.sizes, planner.work
    assert sizes.texts == sizes.rows == 1
    assert sizes.text_tokens == work.prompt_tokens + work.completion_tokens
    rows = sampling_held_out(planner, prompts_of(200, 60), 1).decode_rows
    held = predict(
        GEMMA_2B,
        RewardFootprint(),
        replace(work, prompts=200, k=1, prompt_tokens=60),
        replace(plan.choice, decode_rows=rows),
        plan.limit,
    )
    assert rows == 1 or held.stages["rollout"] <= plan.limit


def test_each_rank_decodes_its_share_of_the_held_out_prompts() -> None:
    planner, _ = planner_of(8e9, batch_size=4, K=3)
    two = replace(planner, ranks=2)
    assert sampling_held_out(two, prompts_of(41, 60), 1).decode_rows == 21


def test_each_prompts_own_cache_counts_beside_the_batch_it_is_merged_into() -> None:
    planner, plan = planner_of(16e9, weights="dense")
    work = replace(planner.work, prompts=64, k=1, prompt_tokens=4096, completion_tokens=8)
    choice = replace(plan.choice, decode_rows=64)
    held = predict(GEMMA_2B, RewardFootprint(), work, choice, plan.limit)
    caches = 64 * 4096 * GEMMA_2B.cache_values * choice.value_bytes
    assert held.stages["rollout"] > plan.weights + plan.adapter + 2 * caches


def test_all_of_few_short_held_out_prompts_are_answered_together() -> None:
    planner, plan = planner_of(8e9, batch_size=4, K=3)
    assert plan.choice.decode_rows == 12
    assert sampling_held_out(planner, prompts_of(40, 60), 1).decode_rows == 40


def test_fewer_are_answered_together_where_that_is_asked_for_or_environments_talk() -> None:
    planner, _ = planner_of(8e9, batch_size=4, K=3, decode_rows=6)
    assert sampling_held_out(planner, prompts_of(40, 60), 1).decode_rows == 6
    planner, _ = planner_of(8e9, batch_size=4, K=3, environment="file.py:Class")
    assert sampling_held_out(planner, prompts_of(40, 60), 1).decode_rows == 12
