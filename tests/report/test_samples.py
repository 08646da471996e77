"""Answers of an iteration, as people read them: by prompt, the best first."""

import re
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.core.errors import STEERING, InputError
from mlx_grpo.report.samples import sheets
from tests.helpers.runs import write_run
from tests.helpers.terminal import mlx_grpo
from tests.helpers.tiny import write_jsonl

REWARDS = {"rain": (0.5, 2.0, None), "tea": (3.0, 1.0, 2.0), "bees": (-1.0, -1.0, 0.0)}
STEERING_TEXT = "\x1b[2J\x1b]0;owned\x07\u202e"


def sampled(step: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "id": name,
            "prompt": f"say {name}",
            "completion": f"{name}, take {i} of {step}{STEERING_TEXT * (i == 1)}",
            "finish_reason": "length" if i == 2 else "stop",
            "reward": reward,
        }
        for name, rewards in REWARDS.items()
        for i, reward in enumerate(rewards)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run")
    write_jsonl(run / "completions.jsonl", [*sampled(1), *sampled(2)])
    return run


def test_prompts_and_answers_stand_from_the_highest_reward_to_the_lowest(run: Path) -> None:
    found = sheets(run)
    assert found.title == f"{run}: answers of iteration 2"
    assert [s.prompt for s in found.shown] == ["say tea", "say bees", "say rain"]
    assert [label for label, _ in found.shown[0].answers] == ["+3.000", "+2.000, cut off", "+1.000"]
    # a reward that is not finite is below all others
    assert [label for label, _ in found.shown[2].answers][-1] == "not finite, cut off"


def test_held_out_answers_stand_beside_the_sft_models(run: Path) -> None:
    found = sheets(run, iteration=30, held_out=True, limit=3)
    assert (len(found.shown), found.total) == (3, 12)
    before, after = found.shown[0].answers
    assert before[0].startswith("SFT model: +") and after[0].startswith("iteration 30: +")
    gains = [
        float(a[0].split()[2].strip(",")) - float(b[0].split()[2].strip(","))
        for b, a in (s.answers for s in found.shown)
    ]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0 > gains[-1]


def test_the_sft_models_own_evaluation_has_one_answer_a_prompt(run: Path) -> None:
    assert {len(s.answers) for s in sheets(run, iteration=0, held_out=True).shown} == {1}


@pytest.mark.parametrize("prompt", ["tea", "say t"])
def test_a_prompt_is_found_by_its_id_and_by_its_text(run: Path, prompt: str) -> None:
    assert [s.prompt for s in sheets(run, iteration=1, prompt=prompt).shown] == ["say tea"]


def test_what_is_not_there_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no answers of iteration 7; there are 1 to 2"):
        sheets(run, iteration=7)
    with pytest.raises(InputError, match="there are 0, 10, 20, 30, 40, 50, 60"):
        sheets(run, iteration=7, held_out=True)
    with pytest.raises(InputError, match="--prompt: no prompt of iteration 2"):
        sheets(run, prompt="coffee")
    (run / "completions.jsonl").unlink()
    with pytest.raises(InputError, match="no answers yet"):
        sheets(run)
    with pytest.raises(InputError, match="no run here"):
        sheets(tmp_path)


def test_answers_stand_beside_one_another_on_a_terminal(run: Path) -> None:
    terminal = mlx_grpo("samples", str(run), "--prompt", "tea", columns=120)
    assert terminal.end() == 0
    (row,) = [line for line in terminal.screen.display if "tea, take" in line]
    assert [m[1] for m in re.finditer(r"take (\d)", row)] == ["0", "2", "1"]  # by reward
    assert r"\x1b[2J" in "".join(terminal.seen().split())
    assert not STEERING.search(terminal.seen().replace("\n", ""))
