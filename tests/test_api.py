"""Training from Python."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo import GRPOConfig, train


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


def test_other_names_are_no_part_of_it() -> None:
    import mlx_grpo

    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        mlx_grpo.Trainer  # noqa: B018
