"""What is shown: a live view on a terminal, lines elsewhere, and nothing that breaks either."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from mlx_grpo.config.settings import train_config, with_settings
from mlx_grpo.console import doing, output
from mlx_grpo.console.doing import Doing
from mlx_grpo.console.live import LiveView, duration, sparks, trend
from mlx_grpo.console.output import Console
from mlx_grpo.training.loop import train
from tests.helpers.runs import iteration

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOURS = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")


def terminal(width: int = 80, **named: Any) -> Console:
    """A console that writes to a terminal of our own."""
    ui = Console()
    ui.out = RichConsole(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        soft_wrap=True,
        highlight=False,
        **named,
    )
    return ui


def written(ui: Console) -> str:
    assert isinstance(ui.out.file, io.StringIO)
    return ui.out.file.getvalue()


def picture(view: LiveView, width: int = 80) -> str:
    """The view as text."""
    console = RichConsole(file=io.StringIO(), width=width, force_terminal=True)
    with console.capture() as captured:
        console.print(view)
    return ESCAPES.sub("", captured.get())


@pytest.fixture
def view() -> LiveView:
    view = LiveView(60)
    view.history += [iteration(step) for step in range(1, 31)]
    return view


def test_the_view_shows_every_figure_of_the_last_iteration(view: LiveView) -> None:
    with view.stage(31, "update"):
        seen = picture(view)
    for text in (
        *("30/60", "11 min 00 s left", "31: rollout", "+3.000", "+1.00 in 10 iterations"),
        *("0.0180", "target 0.02", "beta", "8", "clip fraction", "0.020", "37 tokens", "30%"),
        *("10%", "120 tok/s", "80 tok/s", "1.10 GB", "22 s"),
    ):
        assert text in seen, text


def test_stages_that_are_done_are_full_and_those_to_come_are_empty(view: LiveView) -> None:
    with view.stage(31, "logprob"):
        line = next(line for line in picture(view).splitlines() if "rollout ━" in line)
    done, now, to_come = re.split("logprob|update", line)
    assert "━" in done and "┄" not in done
    assert "┄" in now and "┄" in to_come and "━" not in to_come


def test_between_iterations_it_says_what_is_being_done(view: LiveView) -> None:
    view.doing = Doing("evaluating")
    view.doing.progress("held-out answers", 3, 12)
    assert "held-out answers 3/12, 0 s" in picture(view)


@pytest.mark.parametrize("width", [120, 80, 60, 40, 30, 20])
def test_no_figure_is_lost_and_no_line_too_long_however_narrow(view: LiveView, width: int) -> None:
    with view.stage(31, "reward"):
        lines = picture(view, width).splitlines()
    assert max(map(len, lines)) <= width
    seen = " ".join(" ".join(lines).split())
    for text in (
        *("30/60", "11 min 00 s left", "31:", "reward", "+3.000", "+1.00 in 10", "0.0180"),
        *("target 0.02", "0.020", "37 tokens", "30%", "10%", "120 tok/s", "80 tok/s", "1.10 GB"),
        *("22 s", "clip fraction", "dead groups", "peak memory"),
    ):
        assert text in seen, text


@pytest.mark.parametrize("width", [100, 60, 40, 20])
def test_a_table_loses_no_figure_however_narrow(width: int) -> None:
    ui = terminal(width)
    rows = [("KL to the SFT model, nats/token", "0.0000", "0.1234"), ("length", "41.0", "37.5")]
    ui.table("12 held-out prompts", ("", "SFT model", "after GRPO"), rows)
    seen = ESCAPES.sub("", written(ui))
    for text in ("SFT model", "after GRPO", *(cell for row in rows for cell in row)):
        assert text in seen, text


def test_before_the_first_iteration_there_is_a_view_too() -> None:
    view = LiveView(60)
    with view.stage(1, "rollout"):
        assert "0/60" in picture(view) and "1: rollout" in picture(view)


def test_a_stage_that_ends_while_it_is_drawn_is_drawn_to_the_end(
    view: LiveView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich draws from a thread of its own; an error there ends the live view."""
    stage, took = view.stage(31, "update"), view._took()
    monkeypatch.setattr(view, "_took", lambda: (stage.__exit__(None, None, None), took)[1])
    stage.__enter__()
    assert "31: rollout" in picture(view)


class Hands:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        for place in (doing, output):
            monkeypatch.setattr(place.time, "monotonic", lambda: self.now)


def test_a_log_says_at_once_what_begins_and_within_two_seconds_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ui, hands = Console(), Hands(monkeypatch)
    with ui.working("evaluating"):
        assert capsys.readouterr().out == "      evaluating\n"
        for tenth in range(1000):
            hands.now = 100 + tenth / 10
            ui.progress("held-out answers", tenth // 10, 2000)
    assert capsys.readouterr().out.splitlines() == [
        "      held-out answers 1/2,000, 1 s",
        "      held-out answers 21/2,000, 21 s",
        "      held-out answers 41/2,000, 41 s",
        "      held-out answers 61/2,000, 1 min 01 s",
        "      held-out answers 81/2,000, 1 min 21 s",
    ]


def test_a_log_says_the_stage_of_a_long_iteration_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ui, hands = Console(), Hands(monkeypatch)
    for seconds, name in ((1, "rollout"), (2, "reward"), (30, "logprob"), (31, "update")):
        hands.now = 100.0 + seconds
        with ui.stage(1, name):
            pass
    assert capsys.readouterr().out.splitlines() == ["      1: rollout", "      1: logprob"]


@pytest.mark.parametrize("what", ["loading", "a [/bold] name"])
def test_a_spinner_has_a_count_a_bar_and_a_clock(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ui, hands = terminal(), Hands(monkeypatch)
    with ui.working(what):
        hands.now += 75
        ui.progress(what, 5, 12)
        ui._doing and ui.out.print(ui._doing)
    assert f"{what} 5/12, 1 min 15 s ━" in ESCAPES.sub("", written(ui))


def test_one_of_several_runs_is_named_on_the_terminal_and_in_the_view(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ui = Console()
    ui.next_run(1, 1, "seed 1")
    assert capsys.readouterr().out == ""
    ui.next_run(2, 3, "seed 43, runs/seed-43")
    assert capsys.readouterr().out == "run 2 of 3: seed 43, runs/seed-43\n"
    assert "run 2 of 3" in picture(LiveView(60, ui.run))


def test_a_resumed_run_shows_what_was_done_before() -> None:
    view = LiveView(60)
    with view.stage(31, "rollout"):
        assert "30/60" in picture(view)


def test_sparks_go_from_the_lowest_to_the_highest_value() -> None:
    assert sparks([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparks([1.0, 1.0]) == "▁▁"
    assert sparks([1.0]) == ""


def test_a_trend_compares_as_many_iterations_as_before() -> None:
    assert trend([0.0] * 10 + [0.5] * 10) == "+0.50 in 10 iterations"
    assert trend([0.0] * 19) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "5 s"),
        (65, "1 min 05 s"),
        (7500, "2 h 05 min"),
        (47 * 3600, "47 h 00 min"),
        (76 * 3600, "3 days 4 h"),
        (float("nan"), "?"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_on_a_terminal_is_followed_live_with_tables_of_answers(
    train_arguments: dict[str, Any],
) -> None:
    ui = terminal()
    assert train(train_config(**{**train_arguments, "show_every": 2}), ui)
    seen = ESCAPES.sub("", written(ui))
    assert "4/4" in seen and "dead groups" in seen
    assert "Answers of iteration 2" in seen and "Answers of iteration 3" not in seen
    assert "held-out: reward" in seen
    assert not re.search(r"^ *1/4  reward", seen, re.MULTILINE)  # the lines of a log


def test_without_a_terminal_there_is_a_line_for_each_iteration(
    train_arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(train_config(**{**train_arguments, "show_every": 1}), Console())
    out = capsys.readouterr().out
    assert len(re.findall(r"^ +\d/4  reward [+-]\d", out, re.MULTILINE)) == 4
    assert "\x1b" not in out and "Answers of" not in out


def test_quiet_says_nothing_but_warnings(
    train_arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ui = terminal(quiet=True)
    assert train(train_config(**{**train_arguments, "num_iterations": 1}), ui)
    assert written(ui) == ""


def test_no_color_is_heeded(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = train_config(**{**train_arguments, "num_iterations": 1})
    colourful = terminal(color_system="standard")
    train(short, colourful)
    assert COLOURS.search(written(colourful))
    monkeypatch.setenv("NO_COLOR", "1")
    plain = terminal(color_system="standard")
    train(with_settings(short, output=f"{short.run.output}-plain"), plain)
    assert not COLOURS.search(written(plain))


def test_a_terminal_that_cannot_draw_gets_lines(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    ui = terminal()
    assert train(train_config(**{**train_arguments, "num_iterations": 1}), ui)
    assert "   1/1  reward" in written(ui)


def test_a_failure_leaves_the_terminal_as_it_was(
    train_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_grpo.training import loop as trainer

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(trainer, "iterate", fails)
    ui = terminal()
    with pytest.raises(RuntimeError, match="out of luck"):
        train(train_config(**train_arguments), ui)
    hidden, shown = (written(ui).count(f"\x1b[?25{c}") for c in "lh")
    assert hidden == shown > 0  # the cursor is back
    ui.say("and now a line")
    assert written(ui).endswith("and now a line\n")
