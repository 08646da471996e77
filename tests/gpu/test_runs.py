"""Whole runs in the GPU's way: training, evaluation, resuming, a reward model that is swapped."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.backend.precision import DTYPES, asked, precision_for
from mlx_grpo.config.settings import TrainConfig, train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.models.reward_model import REWARD_CONFIG, REWARD_HEAD, load_reward_model
from mlx_grpo.models.streamed_reward_model import open_streamed
from mlx_grpo.run import log
from mlx_grpo.training.loop import train
from tests.helpers.interrupted import interrupted_in
from tests.helpers.rounding import APART

QUIET = Console(quiet=True)


@pytest.fixture
def config(packed_run: dict[str, Any]) -> TrainConfig:
    """A run of two iterations."""
    few = {"num_iterations": 2, "minibatch_size": 1, "max_completion_length": 6}
    return train_config(**{**packed_run, **few, "eval_every": 1, "checkpoint_every": 1})


def test_a_run_learns_in_numbers_that_are_finite_and_samples_what_it_scores(
    config: TrainConfig, dtype: str
) -> None:
    assert train(config, QUIET)
    found = log.read(config.run_directory / log.METRICS)
    iterations = [row for row in found if "reward" in row]
    for row in iterations:
        assert row["grad_norm"] > 0 and row["policy/optimizer_steps"] > 0
        assert row["policy/skipped_nonfinite"] == 0
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
        largest = row["sampling/sampling_logp_difference/max"]
        assert largest < APART[dtype]
        assert row["sampling/sampling_logp_difference/mean"] <= largest
    assert len(iterations) == 2 and found[-1]["eval_kl"] > 0


def test_a_run_that_was_stopped_goes_on_bit_for_bit(config: TrainConfig) -> None:
    assert train(config, QUIET)
    whole = config.run_directory.rename(config.run_directory.with_name("whole"))
    with interrupted_in(2), pytest.raises(KeyboardInterrupt):
        train(config, QUIET)
    assert train(config, QUIET, resume=True)
    adapter = "final/adapters.safetensors"
    assert (config.run_directory / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_a_swapped_reward_model_scores_as_one_that_stays(
    packed_model: Path, dtype: str, tmp_path: Path
) -> None:
    judge = tmp_path / "rm"
    judge.mkdir()
    for file in packed_model.iterdir():
        if file.name != "manifest.json":
            (judge / file.name).symlink_to(file)
    (judge / REWARD_CONFIG).write_text(json.dumps({"kind": "full", "input": "policy_token_ids"}))
    head = mx.random.normal((1, 64), key=key(1, "head"))
    mx.save_safetensors(str(judge / REWARD_HEAD), {"weight": head})
    precision = precision_for(dense=False, wanted=asked(dtype))
    assert precision.dtype == DTYPES[dtype]
    answers = [tuple(range(3, 3 + n)) for n in (4, 1, 7)]
    completions = tuple(Completion(ids, "", "stop", ()) for ids in answers)
    group = Group(Prompt("a", (), tuple(range(9))), completions)
    resident = load_reward_model(judge, None, precision=precision).score(group)
    streamed = open_streamed(judge, precision, Sizes(), 1 << 20).score(group)
    assert streamed == pytest.approx(resident, abs=1e-6)
    assert len(set(resident)) == 3
