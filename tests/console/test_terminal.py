"""What a person has seen in the end, on a real pseudo-terminal."""

import re
from pathlib import Path

import pytest

from tests.helpers.terminal import python

SIZES = [(80, 24), (200, 50), (60, 20), (40, 30), (30, 12), (20, 40)]
# The scripts draw ten times as often as for a person: many pictures in a short test.
RUN = """
import time, warnings, sys
from mlx_grpo.console import output
from tests.helpers.runs import iteration
output.REFRESHES_PER_SECOND = 20
ui = output.Console()
with ui.training(6):
    for step in range(1, 7):
        for name in ("rollout", "reward", "logprob", "update"):
            with ui.stage(step, name):
                time.sleep(0.02)
        ui.iteration(iteration(step), 6)
        ui.warn(f"number {step} says that answers are cut off. Raise --max-completion-length.")
        if step == 2:
            warnings.warn("a library's warning")
        if step == 3:
            ui.evaluation(3, {"eval_reward": 1.0, "eval_kl": 0.1, "eval_perplexity": 9.0,
                "eval_completions/mean_length": 20.0, "eval_completions/clipped_ratio": 0.5}, "x")
        if step == 4:
            ui.relay("the reward function printed this")
        time.sleep(0.12)
    with ui.working("saving"):
        time.sleep(0.12)
    ui.end_view()
    ui.say("done: runs/seed-42")
ui.warn("stopped early; go on with: mlx-grpo train")
ui.error("the last word")
"""


def compact(text: str) -> str:
    """Without white space, for words are wrapped at other places at each width."""
    return "".join(text.split())


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_every_warning_is_seen_whole_and_the_picture_once(columns: int, lines: int) -> None:
    shown = python(RUN, columns=columns, lines=lines)
    assert shown.end() == 0
    seen = compact(shown.seen())
    warnings = [
        f"warning: number {step} says that answers are cut off. Raise --max-completion-length."
        for step in range(1, 7)
    ]
    said = [
        *("   3  held-out: reward +1.000", "the reward function printed this"),
        *("a library's warning", "warning: stopped early; go on with: mlx-grpo train"),
        "error: the last word",
    ]
    for text in (*warnings, *said):
        assert seen.count(compact(text)) == 1, f"{text}:\n{shown.seen()}"
    order = [seen.index(compact(text)) for text in warnings]
    assert order == sorted(order)
    # no piece of an earlier frame stays
    pieces = {"iterations": 1, "clipfraction": 1, "iteration22s": 1, "KL": 1}
    assert {p: seen.count(p) for p in pieces} == pieces, shown.seen()
    assert "6/6" in seen and not re.search(r"[0-5]/6", seen)
    # the last picture tells of nothing under way, and what is said of the end stands below it
    assert "saving" not in seen
    assert seen.index("iteration22s") < seen.index("done:runs/seed-42")


RACE = """
import time
from mlx_grpo.console import output
from tests.helpers.runs import iteration
output.REFRESHES_PER_SECOND = 500
ui = output.Console()
with ui.training(200):
    for step in range(1, 201):
        ui._view.history = []  # a picture without figures is not as high
        time.sleep(0.004)
        ui.iteration(iteration(step), 200)
        ui.warn(f"number {step}")
"""


def test_no_piece_of_a_picture_stays_that_is_drawn_while_something_is_printed() -> None:
    shown = python(RACE)
    assert shown.end() == 0
    seen = shown.seen()
    assert seen.count("warning: number") == 200
    assert seen.count("iterations") == seen.count("KL") == 1


RESUMED = """
from mlx_grpo.console.output import Console
from tests.helpers.runs import evaluation, iteration
nothing = {**iteration(3), "kl": None}  # as a log holds NaN
before = [evaluation(0), iteration(1), iteration(2), nothing, {"step": 4, "skipped": "loss"}]
with Console().training(9, before):
    pass
"""


def test_a_resumed_run_goes_on_with_the_trends_it_had() -> None:
    shown = python(RESUMED)
    assert shown.end() == 0
    seen = shown.seen()
    assert "2/9" in seen and "+0.200" in seen and "▁█" in seen


SPINNER = """
import time, warnings
from mlx_grpo.console import output
output.REFRESHES_PER_SECOND = 20
ui = output.Console()
with ui.working("loading"):
    for i in range(3):
        ui.progress("held-out answers", i, 3)
        time.sleep(0.12)
        ui.warn(f"prompt {i} is skipped")
        ui.say(f"said {i}")
    warnings.warn("a library's warning")
    time.sleep(0.12)
"""


def test_beside_a_spinner_nothing_is_lost_either_and_no_spinner_stays() -> None:
    shown = python(SPINNER)
    assert shown.end() == 0
    seen = shown.seen()
    for i in range(3):
        assert seen.count(f"warning: prompt {i} is skipped") == seen.count(f"said {i}") == 1
    assert seen.count("a library's warning") == 1
    assert "loading" not in seen and "held-out answers" not in seen


@pytest.mark.parametrize("script", [RUN, SPINNER])
def test_warnings_go_to_the_file_that_standard_error_is(script: str, tmp_path: Path) -> None:
    with (tmp_path / "errors.log").open("wb") as file:
        shown = python(script, stderr=file)
        assert shown.end() == 0
    told = (tmp_path / "errors.log").read_text()
    assert "a library's warning" in told
    assert len(re.findall(r"^warning: ", told, re.MULTILINE)) == (7 if script is RUN else 3)
    assert "\x1b" not in told and "warning" not in shown.seen()
