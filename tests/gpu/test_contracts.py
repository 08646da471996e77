"""What Metal needs and no Mac is needed to see: dtypes in flight, kinds of operations."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_grpo.backend.precision import DTYPES
from mlx_grpo.config.settings import TrainConfig, train_config
from mlx_grpo.console.output import Console
from mlx_grpo.models import stand_ins
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.plan import footprint
from mlx_grpo.training.loop import train

NO_METAL_KERNEL = {"Cholesky", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD"}
"""Primitives for which MLX's Metal backend raises (mlx 0.32, backend/metal/primitives.cpp)."""


@pytest.fixture
def config(packed_run: dict[str, Any]) -> TrainConfig:
    """One iteration with its evaluations."""
    return train_config(**{**packed_run, "num_iterations": 1, "max_completion_length": 4})


def test_the_stream_between_blocks_has_the_dtype_asked_for_and_fp32_behind_the_last(
    config: TrainConfig, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, seen = DTYPES[dtype], set[tuple[str, mx.Dtype]]()
    # the planner looks at the model as it is stored, and computes nothing
    monkeypatch.setattr(footprint, "check_trainable", lambda _: None)
    call_block, leave = Decoder.call_block, stand_ins._Fp32Exit.__call__

    def noted(self: Decoder, e: Any, i: int, *h: mx.array) -> Any:
        out = call_block(self, e, i, *h)
        seen.update(("in", v.dtype) for v in h)
        place = "end" if i + 1 == len(self.blocks) else "between"
        seen.update((place, v.dtype) for v in out)
        return out

    def left(self: Any, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        out = leave(self, h, *args, **kwargs)
        seen.update({("in", h.dtype), ("rollout's end", out.dtype)})
        return out

    monkeypatch.setattr(Decoder, "call_block", noted)
    monkeypatch.setattr(stand_ins._Fp32Exit, "__call__", left)
    assert train(config, Console(quiet=True))
    assert seen == {
        ("in", half),
        ("between", half),
        ("end", mx.float32),
        ("rollout's end", mx.float32),
    }


def test_nothing_is_evaluated_that_metal_has_no_kernel_for(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primitives, dtypes = set[str](), set[mx.Dtype]()

    def noting(real: Callable[..., None]) -> Callable[..., None]:
        def evaluate(*trees: Any) -> None:
            arrays = [v for _, v in tree_flatten(list(trees)) if isinstance(v, mx.array)]
            dtypes.update(v.dtype for v in arrays)
            mx.export_to_dot(str(tmp_path / "graph.dot"), *arrays)
            text = (tmp_path / "graph.dot").read_text()
            primitives.update(re.findall(r'label\s*=\s*"([A-Z]\w+)', text))
            real(*trees)

        return evaluate

    monkeypatch.setattr(mx, "eval", noting(mx.eval))
    monkeypatch.setattr(mx, "async_eval", noting(mx.async_eval))
    assert train(config, Console(quiet=True))
    assert {"QuantizedMatmul", "AddMM"} <= primitives
    assert not primitives & NO_METAL_KERNEL
    assert mx.float64 not in dtypes
