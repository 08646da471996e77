"""Templates, schedules, targets and scales that a user may choose reach the run, and its resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import TrainConfig, train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import read_chat_tokenizer
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.run import log
from mlx_grpo.training.loop import train
from tests.helpers.interrupted import interrupted_in
from tests.helpers.tiny import CHAT_TEMPLATE

QUIET = Console(quiet=True)
TEMPLATE = CHAT_TEMPLATE.replace("'<assistant>'", "'<a>' if thinking else '<b>'")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The iterations' rows, without times and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [log.repeatable(row) for row in rows if "reward" in row]


@pytest.fixture
def chosen(train_arguments: dict[str, Any], tmp_path: Path) -> TrainConfig:
    """Settings of which none is a default."""
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    (tmp_path / "rewards.py").write_text(
        "def short(completions): return [-len(c) for c in completions]\n"
        "def low(completions): return [c.count('a') / 100 for c in completions]\n"
    )
    return train_config(
        **train_arguments,
        chat_template=str(tmp_path / "mine.jinja"),
        chat_template_kwargs='{"thinking": true}',
        system_prompt="Be kind.",
        lr_scheduler_type="linear",
        warmup_ratio=0.25,
        lora_target_modules=("q_proj", "down_proj"),
        multi_objective_aggregation="normalize_then_sum",
        reward=(f"{tmp_path / 'rewards.py'}:short", f"{tmp_path / 'rewards.py'}:low"),
    )


def test_a_run_of_other_choices_resumes_bit_for_bit(chosen: TrainConfig, tmp_path: Path) -> None:
    assert train(chosen, QUIET)
    rows = metrics(chosen.run_directory)
    rates = [row["learning_rate"] / chosen.optimizer.learning_rate for row in rows]
    assert rates == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])
    saved = json.loads((chosen.run_directory / "final" / "adapter_config.json").read_text())
    assert saved["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]

    broken = with_settings(chosen, output=str(tmp_path / "broken"))
    with interrupted_in(4), pytest.raises(KeyboardInterrupt):
        train(broken, QUIET)
    assert train(broken, QUIET, resume=True)
    assert metrics(broken.run_directory) == rows
    final = "final/adapters.safetensors"
    found = (broken.run_directory / final).read_bytes()
    assert found == (chosen.run_directory / final).read_bytes()


def test_an_evaluation_sees_what_the_run_saw_and_a_changed_template_is_refused(
    chosen: TrainConfig, tmp_path: Path
) -> None:
    short = with_settings(chosen, num_iterations=1, eval_limit=1)
    assert train(short, QUIET)
    compared = compare_run(short.run_directory, None, "", QUIET)
    prompt = compared.before.groups[0].prompt
    assert prompt.messages[0] == {"role": "system", "content": "Be kind."}
    tokenizer = read_chat_tokenizer(Path(short.model.actor))
    assert tokenizer.decode(list(prompt.token_ids)).endswith("<a>")

    (tmp_path / "mine.jinja").rename(tmp_path / "moved.jinja")
    moved = with_settings(short, chat_template=str(tmp_path / "moved.jinja"))
    assert train(moved, QUIET, resume=True)
    (tmp_path / "moved.jinja").write_text(TEMPLATE + "{# changed #}")
    with pytest.raises(InputError, match="--chat-template other content"):
        train(moved, QUIET, resume=True)
    with pytest.raises(InputError, match=r"--system-prompt Be kind\. -> Be brief\."):
        train(with_settings(moved, system_prompt="Be brief."), QUIET, resume=True)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_advantages_are_scaled_as_asked(train_arguments: dict[str, Any], scale: str) -> None:
    plain = {**train_arguments, "num_iterations": 1}
    assert train(train_config(**plain, scale_advantages="none"), QUIET)
    whole = metrics(Path(plain["output"]))
    shutil.rmtree(plain["output"])
    assert train(train_config(**plain, scale_advantages=scale), QUIET)
    scaled = metrics(Path(plain["output"]))
    assert scaled[0]["reward"] == whole[0]["reward"]
    assert scaled[0]["grad_norm"] != whole[0]["grad_norm"]
