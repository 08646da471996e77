"""The example reward marks as its text says, its prompts say what it checks, and a run takes it."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.calculator import Calculator, right
from examples.constraints import all_met, constraints
from examples.number_game import NumberGame
from mlx_grpo.config.checks import check
from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.data.tables import read_rows
from mlx_grpo.plan.devices import device
from mlx_grpo.plan.memory import RewardFootprint
from mlx_grpo.plan.planner import Planner
from mlx_grpo.training.loop import train
from tests.helpers.shapes import GEMMA_2B

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = ("constraints_train.jsonl", "constraints_eval.jsonl")
LIMITS = ("min_words", "max_words", "keyword")


def read(name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(EXAMPLES / name)]


@pytest.mark.parametrize(
    ("text", "reason", "mark"),
    [
        ("Green tea is good.", "stop", 1.0),
        ("Tea is green and good for you.", "stop", (1 - 1 / 6 + 1 + 1) / 3),  # a word too many
        ("Tea.", "stop", (1 - 2 / 3 + 1 + 1) / 3),  # two words short of three
        ("Steak is good.", "stop", 2 / 3),  # 'tea' is not a word in it
        ("Green tea is good", "stop", (1 + 1 + 0.5) / 3),
        ("Green tea is good.", "length", (1 + 1 + 0.5) / 3),
        ("good " * 40, "length", 0.0),
        ("", "stop", 0.5 / 3),
    ],
)
def test_marks_of_cases_done_by_hand(text: str, reason: str, mark: float) -> None:
    (found,) = constraints([text], [reason], min_words=3, max_words=6, keyword="tea")
    assert found == pytest.approx(mark)
    assert all_met([text], [reason], 3, 6, "tea") == [float(mark == 1.0)]


def test_held_out_answers_meet_every_constraint() -> None:
    for row in read(FILES[1]):
        limits = {name: row[name] for name in LIMITS}
        assert constraints([row["response"]], ["stop"], **limits) == [1.0], row["id"]


def test_prompts_say_in_words_what_their_fields_demand() -> None:
    train, held_out = map(read, FILES)
    assert len(train) >= 200
    assert len(held_out) >= 60
    for row in train + held_out:
        words = f"in {row['min_words']} to {row['max_words']} words"
        assert words in row["prompt"]
        assert f'"{row["keyword"]}", and end with a full stop' in row["prompt"]
    questions = [
        {row["prompt"].split(" Answer in ")[0] for row in rows} for rows in (train, held_out)
    ]
    assert not questions[0] & questions[1]


def test_the_files_are_what_their_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_constraints.py", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "make_constraints.py"), run_name="__main__")
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_the_prompts_of_the_environments_are_what_their_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_environments.py", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "make_environments.py"), run_name="__main__")
    made = sorted(tmp_path.iterdir())
    assert len(made) == 6
    for file in made:
        assert file.read_bytes() == (EXAMPLES / file.name).read_bytes()


def test_the_number_game_rewards_a_found_number_most() -> None:
    marks = []
    for guesses in ((), (1,), (60,), (150, 40, 42), (42,)):
        game = NumberGame()
        game.reset(secret=42, low=1, high=300)
        hints = [game.guess(g) for g in guesses]
        marks.append(game.reward())
    assert marks == sorted(marks) and marks[0] == 0 and marks[-1] == pytest.approx(0.98)
    assert hints == ["correct, the game is over"]


def test_the_calculator_rewards_the_call_that_helps_and_the_answer_that_is_right() -> None:
    marks = []
    for calls in ((), ((1, 2),), ((1200, 34),)):
        calculator = Calculator()
        calculator.reset(answer=1234)
        for a, b in calls:
            calculator.add(a, b)
        marks.append(calculator.reward())
    assert marks == [0.0, 0.2, 0.5]
    said = ["It is 1234.", "1200 + 34 = 1,234", "It is 1235.", "It is 1234 or 1235."]
    turns = [[{"role": "assistant", "content": text}] for text in said]
    assert right(turns, 1234) == [1.0, 1.0, 0.0, 0.0]


def test_a_run_trains_on_it_and_watches_a_second_figure(train_arguments: dict[str, Any]) -> None:
    config = train_config(
        **{
            **train_arguments,
            "rm_model": "none",
            "reward": (f"{EXAMPLES}/constraints.py:constraints",),
            "eval_reward": (f"{EXAMPLES}/constraints.py:all_met",),
            "prompts": str(EXAMPLES / FILES[0]),
            "eval_prompts": str(EXAMPLES / FILES[1]),
            "eval_limit": 2,
            "num_iterations": 1,
            "eval_every": 1,
        }
    )
    assert train(config, Console(quiet=True))
    lines = (config.run_directory / "metrics.jsonl").read_text().splitlines()
    (iteration,) = [row for row in map(json.loads, lines) if "reward" in row]
    assert iteration["reward"] == pytest.approx(iteration["rewards/constraints/mean"])
    assert "rewards/all_met/mean" in iteration


@pytest.mark.parametrize("limit, most_hours", [("2.5GB", 12), ("9.14GB", 8)])
def test_the_defaults_plan_the_reference_run_in_a_night_on_an_m2_pro(
    limit: str, most_hours: int
) -> None:
    config = build_config(None, {"memory_limit": limit})
    check(config)
    judge = RewardFootprint(GEMMA_2B.lora_bytes(8))
    planner = Planner(config, GEMMA_2B, judge, here=False, ranks=1)
    plan = planner.plan()
    seconds = sum(t.expected for t in planner.times(plan, device("m2-pro")).values())
    assert plan.fits and config.run.num_iterations == 800
    assert 800 * seconds < most_hours * 3600


def test_the_cells_of_the_notebook_run_in_their_order(
    sft: Path, prompt_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, source in (
        ("weights/sft-4bit", sft),
        ("data/rl_prompts.jsonl", prompt_files[0]),
        ("data/eval_prompts.jsonl", prompt_files[1]),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "train_from_python.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(c.get("outputs", []) == [] for c in notebook["cells"])
    seen: dict[str, Any] = {}
    for cell in cells:
        short = re.sub(r"(num_iterations|eval_every)=\d+", r"\1=2", cell)
        exec(re.sub(r"max_completion_length=\d+", "max_completion_length=6", short), seen)
    assert seen["run"].finished and [row["step"] for row in seen["iterations"]] == [1, 2]
    assert seen["row"]["reward_std"] >= 0
