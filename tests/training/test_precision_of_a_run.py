"""fp16 ends at 65504: a run does not start in it where a model would leave its range."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.backend.precision import Precision
from mlx_grpo.config.settings import train_config
from mlx_grpo.models.backbone import largest_state, load_backbone
from mlx_grpo.training.setup import load_policy
from tests.helpers.tiny import write_model

HALF = Precision("cpu", dense=False, dtype=mx.float16)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A tiny llama whose first block writes numbers that fp16 cannot hold."""
    path = write_model(tmp_path / "wide")
    weights = dict(mx.load(str(path / "model.safetensors")))
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name] * 1e5
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


def test_a_model_that_fits_runs_in_fp16(sft: Path) -> None:
    backbone = load_policy(train_config(actor_model=str(sft)), HALF)
    assert backbone.precision == HALF and backbone.note is None
    assert 0 < largest_state(backbone) < 100


def test_a_model_that_leaves_the_range_runs_in_bf16_and_says_so(wide: Path) -> None:
    assert largest_state(load_backbone(wide, HALF)) == float("inf")
    backbone = load_policy(train_config(actor_model=str(wide)), HALF)
    assert str(backbone.precision) == "packed bf16"
    assert backbone.note == (
        f"{wide}: a state between its blocks reaches inf of the 65504 that fp16 holds, so it "
        "computes in bf16"
    )


def test_who_asks_for_fp16_gets_it_and_a_warning(wide: Path) -> None:
    backbone = load_policy(train_config(actor_model=str(wide), precision="fp16"), HALF)
    assert backbone.precision == HALF
    assert backbone.note is not None and backbone.note.endswith("; --precision bf16 has room")


def test_a_resumed_run_computes_as_it_began(
    sft: Path, train_arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_grpo.console.output import Console
    from mlx_grpo.core.errors import InputError
    from mlx_grpo.training.loop import train

    config = train_config(**{**train_arguments, "num_iterations": 2, "precision": "bf16"})
    assert train(config, Console(quiet=True))
    state = next(config.run_directory.glob("checkpoints/step-*/state.json"))
    assert json.loads(state.read_text())["weights"] == "dense bf16"
    with pytest.raises(InputError, match="--precision bf16 -> fp32"):
        longer = {**train_arguments, "num_iterations": 2, "precision": "fp32"}
        train(train_config(**longer), Console(quiet=True), resume=True)
