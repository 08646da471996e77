"""Training from Python."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_grpo import GRPOConfig, Run, iterate, train
from mlx_grpo.core.errors import InputError
from mlx_grpo.run import log


def test_a_run_from_python_is_the_run_of_the_command(train_arguments: dict[str, Any]) -> None:
    run = train(GRPOConfig(**{**train_arguments, "num_iterations": 2}), quiet=True)
    assert run.finished and run.directory == Path(train_arguments["output"])
    assert run.final and (run.final / "adapters.safetensors").is_file()
    rows = run.metrics()
    assert [r["step"] for r in rows if "reward" in r] == [1, 2]
    assert [r["step"] for r in rows if "eval_reward" in r][-1] == 2
    if not any(r.get("eval_best") for r in rows):
        assert run.best is None


def test_what_cannot_work_is_a_value_error(train_arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="K: must be at least 2"):
        train(GRPOConfig(**{**train_arguments, "K": 1}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("K", "4"),
        ("K", 4.5),
        ("K", True),
        ("K", None),
        ("learning_rate", "1e-4"),
        ("learning_rate", float("nan")),
        ("output", Path("runs")),
        ("actor_model", 7),
        ("kl_control", "magic"),
        ("kl_targets", ("0.1", "much")),
        ("kl_targets", {"first": 0.1}),
        ("reward", (len,)),
        ("batch_size", [4]),
    ],
)
def test_a_value_of_a_wrong_type_is_a_value_error_that_names_it(
    name: str, value: Any, train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{name.replace('_', '[-_]')}.* must be ") as failure:
        train(GRPOConfig(**{**train_arguments, name: value}), quiet=True)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [None, {"K": 4}, GRPOConfig, "run.toml"])
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(InputError, match="config: must be a GRPOConfig, not "):
        train(config)


@pytest.mark.parametrize("named", [{"resume": "no"}, {"quiet": 1}])
def test_a_switch_that_is_no_bool_is_refused(
    named: dict[str, Any], train_arguments: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="must be True or False, not "):
        train(GRPOConfig(**train_arguments), **named)


def test_a_list_may_stand_for_a_tuple(train_arguments: dict[str, Any]) -> None:
    given = {**train_arguments, "num_iterations": 1, "kl_targets": [1, 0.5], "learning_rate": 1}
    run = train(GRPOConfig(**given), quiet=True)
    assert "\ntargets = [1.0, 0.5]" in (run.directory / "config.toml").read_text()


def test_other_names_are_no_part_of_it() -> None:
    import mlx_grpo

    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        mlx_grpo.Trainer  # noqa: B018


def test_a_run_is_followed_row_by_row_and_broken_off_saved(
    train_arguments: dict[str, Any],
) -> None:
    config = GRPOConfig(**train_arguments)
    whole = train(
        GRPOConfig(**{**train_arguments, "output": f"{train_arguments['output']}-whole"}),
        quiet=True,
    )
    rows = []
    for row in iterate(config, quiet=True):
        rows.append(row)
        if row["step"] == 3:
            break
    run = Run(config.run_directory, finished=False)
    assert rows == run.metrics() and run.final is None
    assert sorted(p.name for p in (run.directory / "checkpoints").glob("step-*"))[-1].endswith("3")
    rest = list(iterate(config, resume=True, quiet=True))
    assert [r["step"] for r in rest] == [4, 4]  # the iteration and its evaluation
    assert list(map(log.repeatable, run.metrics())) == list(map(log.repeatable, whole.metrics()))
    assert (
        run.final
        and (run.final / "adapters.safetensors").read_bytes()
        == (whole.directory / "final" / "adapters.safetensors").read_bytes()
    )


def test_a_function_is_told_each_row_and_what_it_raises_ends_the_run_saved(
    train_arguments: dict[str, Any],
) -> None:
    told: list[int] = []

    def watch(row: dict[str, Any]) -> None:
        told.append(row["step"])
        if row["step"] == 1:
            raise RuntimeError("enough")

    config = GRPOConfig(**train_arguments)
    with pytest.raises(RuntimeError, match="enough"):
        train(config, quiet=True, on_log=watch)
    assert told == [0, 1]
    assert (config.run_directory / "checkpoints" / "step-000001").is_dir()
    run = train(config, resume=True, quiet=True, on_log=lambda row: told.append(row["step"]))
    assert run.finished and told == [0, 1, 2, 2, 3, 4, 4]


def test_metrics_are_a_dataframe_where_pandas_is_there(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(finished_run, finished=True)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert run.dataframe() == run.metrics() != []
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="type: pip install pandas"):
        run.dataframe()
