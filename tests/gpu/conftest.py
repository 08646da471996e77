"""Tiny models in 4 bits with heads as wide as Gemma's, and a reward adapter for each."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.backend.device import device_name
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.reward_modeling.train import train_rm
from tests.helpers.tiny import write_model

WIDE = {"head_dim": 256, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64}
"""Gemma's heads, the widest that MLX's attention kernels know; groups of 64, as models have."""
EVERY = [(family, dtype) for family in ("llama", "gemma") for dtype in ("bf16", "fp16")]
FEW = [("llama", "bf16"), ("gemma", "fp16")]
"""On a CPU, whose 16-bit kernels are slow."""


@pytest.fixture(scope="session", params=FEW if device_name() == "cpu" else EVERY, ids="-".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(family, dtype of the blocks)."""
    family, dtype = request.param
    return family, dtype


@pytest.fixture(scope="session")
def dtype(way: tuple[str, str]) -> str:
    """What the blocks compute in."""
    return way[1]


@pytest.fixture(scope="session")
def packed_model(way: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 4 bits."""
    root = tmp_path_factory.mktemp("-".join(way))
    source = write_model(root / "source", way[0], **WIDE)
    convert_sft(locate(str(source)), root / "sft-4bit", Quantization(4, 64), None)
    return root / "sft-4bit"


@pytest.fixture(scope="session")
def packed_judge(packed_model: Path, dtype: str, pair_file: Path) -> Path:
    """A reward adapter that was trained in the same way."""
    out = packed_model.parent / f"rm-{dtype}"
    train_rm(
        RewardTrainConfig(
            model=str(packed_model),
            pairs=str(pair_file),
            output=str(out),
            precision=dtype,  # type: ignore[arg-type]
            weights="packed",
            lora_rank=2,
            learning_rate=1e-2,
            epochs=1,
        )
    )
    return out


@pytest.fixture
def packed_run(
    packed_model: Path, packed_judge: Path, dtype: str, train_arguments: dict[str, Any]
) -> dict[str, Any]:
    """Fields of a TrainConfig of a run in this way, on little."""
    models = {"actor_model": str(packed_model), "rm_model": str(packed_judge)}
    way = {"precision": dtype, "weights": "packed"}
    return {**train_arguments, **models, **way, "batch_size": 2, "eval_limit": 1}
