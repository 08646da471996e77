"""How long it will take is said before the first iteration, evaluations and other runs included."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.cli.train import Run, train_all
from mlx_grpo.config.settings import train_config, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.distributed.ranks import ALONE
from mlx_grpo.grpo.learner import first_state
from mlx_grpo.training.estimate import (
    Pace,
    evaluations_left,
    guessed_pace,
    measured_pace,
    say_how_long,
)
from mlx_grpo.training.loop import _evaluation_due as evaluation_due
from mlx_grpo.training.loop import train
from mlx_grpo.training.setup import load_learner

HOUR = 3600.0


@pytest.mark.parametrize(("total", "every"), [(10, 4), (8, 4), (3, 50), (1, 1), (7, 1)])
def test_the_evaluations_that_are_left_are_those_that_will_come(total: int, every: int) -> None:
    config = train_config(num_iterations=total, eval_every=every)
    for done in range(total + 1):
        state = replace(first_state(config), evaluated=done)
        due = [evaluation_due(replace(state, iteration=i), config) for i in range(done, total + 1)]
        assert evaluations_left(config, done) == sum(due)


def test_time_left_counts_iterations_and_evaluations() -> None:
    config = train_config(num_iterations=10, eval_every=4)
    assert Pace(2.0, 100.0).left(config, 0) == 20 + 300
    assert Pace(2.0, 100.0).left(config, 8) == 4 + 100
    assert Pace(2.0, 100.0).left(config, 10) == 0


def test_a_pace_is_measured_by_the_latest_rows() -> None:
    rows = [{"time/evaluate": 50.0}, *({"time/iteration": t} for t in (99.0, *[3.0] * 10))]
    assert measured_pace(rows) == Pace(3.0, 50.0)
    assert measured_pace(rows[:1]) is None


def test_the_guess_grows_with_the_work_of_an_iteration(train_arguments: dict[str, Any]) -> None:
    def guess(**changes: Any) -> float:
        config = train_config(**{**train_arguments, **changes})
        return guessed_pace(load_learner(config, Console(quiet=True)), 10.0).iteration

    small, large = guess(K=3), guess(K=6)
    assert 1.5 < large / small < 2.5
    assert small > 10.0  # twelve answers and an update beside three answers


def test_answers_that_are_shown_count_unless_they_are_the_samples(
    train_arguments: dict[str, Any],
) -> None:
    def guess(temperature: float, samples: int) -> float:
        own = {"eval_temperature": temperature, "num_generations_eval": samples}
        config = train_config(**{**train_arguments, **own})
        return guessed_pace(load_learner(config, Console(quiet=True)), 10.0).iteration

    assert guess(1.0, 1) > guess(0.0, 1)
    assert guess(1.0, 4) == guess(0.0, 4)


def test_days_are_warned_of_once_with_what_makes_it_shorter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ui, config = Console(), train_config(num_iterations=100, eval_every=50)
    say_how_long(ui, config, Pace(0.4 * HOUR, 1.0), 0, "a first guess")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        say_how_long(ui, config, Pace(0.7 * HOUR, HOUR), 0, "a first guess")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == (
        "time left, a first guess: about 3 days 0 h (100 iterations of 42 min 00 s, 2 evaluations "
        "of 1 h 00 min)"
    )
    (warning,) = err.splitlines()
    assert "about 3 days 0 h" in warning and "--num-iterations" in warning


def test_runs_to_come_count(capsys: pytest.CaptureFixture[str]) -> None:
    ui, config = Console(), train_config(num_iterations=10, eval_every=10)
    ui.next_run(1, 3, "seed 1")
    say_how_long(ui, config, Pace(2 * HOUR, HOUR), 0, "a first guess")
    out, err = capsys.readouterr()
    # 21 hours, and twice 22 with the evaluation before the first iteration
    assert out.strip().endswith("; with the 2 runs after it about 2 days 17 h")
    assert "this takes about 2 days 17 h" in err


def test_train_says_it_before_its_first_iteration_and_when_it_goes_on(
    train_arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlx_grpo.training import loop

    config, real = train_config(**train_arguments), loop.iterate

    def dies_in_iteration_four(learner: Any, state: Any, *rest: Any) -> Any:
        if state.iteration == 3:
            raise KeyboardInterrupt
        return real(learner, state, *rest)

    monkeypatch.setattr(loop, "iterate", dies_in_iteration_four)
    with pytest.raises(KeyboardInterrupt):
        train(config, Console())
    lines = capsys.readouterr().out.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith("time left, ")]
    first = next(i for i, line in enumerate(lines) if re.match(r" +1/4  reward", line))
    assert said[0] < first < said[1]
    assert "a first guess" in lines[said[0]] and "2 evaluations of" in lines[said[0]]
    assert "by the first iteration" in lines[said[1]]
    monkeypatch.setattr(loop, "iterate", real)
    assert train(config, Console(), resume=True)
    assert "time left, at its pace so far: about" in capsys.readouterr().out


def test_several_seeds_say_which_and_how_long_all_take(
    train_arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = train_config(**{**train_arguments, "num_iterations": 1})
    runs = [with_settings(base, seed=s, output=str(tmp_path / f"seed-{s}")) for s in (1, 2)]
    assert train_all([Run(c, False) for c in runs], Console(), False, False, ALONE)
    out = capsys.readouterr().out
    assert [m[0] for m in re.findall(r"(run (\d) of 2: seed \2, )", out)] == [
        "run 1 of 2: seed 1, ",
        "run 2 of 2: seed 2, ",
    ]
    assert out.count("; with the run after it about ") == 1  # the last has none after it


def test_after_a_run_that_was_stopped_no_other_is_announced(
    train_arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlx_grpo.training.loop.train", lambda *_: False)
    base = train_config(**train_arguments)
    runs = [with_settings(base, seed=s, output=str(tmp_path / f"seed-{s}")) for s in (1, 2)]
    assert not train_all([Run(c, False) for c in runs], Console(), False, False, ALONE)
    out = capsys.readouterr().out
    assert "run 1 of 2" in out and "run 2 of 2" not in out


def test_answers_are_counted_while_they_are_written(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = load_learner(train_config(**train_arguments), Console(quiet=True))
    told: list[tuple[str, int, int]] = []
    learner.evaluator(learner.roles.reference, lambda *p: told.append(p))
    answers = [(what, done) for what, done, total in told if what.startswith("held-out answers")]
    assert answers[0] == ("held-out answers (token 0 of 8)", 0)
    assert {f"held-out answers (token {t} of 8)" for t in range(8)} <= {w for w, _ in answers}
    assert [done for _, done in answers] == sorted(done for _, done in answers)
    assert answers[-1][1] == 3


def test_reference_answers_that_must_be_drawn_are_counted(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Console, "progress", lambda _, *p: told.append(p))
    given = {**train_arguments, "eval_prompts": train_arguments["prompts"]}
    load_learner(train_config(**given), Console(quiet=True))
    assert ("reference answers (token 0 of 8)", 0, 8) in told
