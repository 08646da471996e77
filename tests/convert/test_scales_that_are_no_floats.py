"""mxfp4, mxfp8 and nvfp4: their scales are bytes, and no dtype may be taken from them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert as mlx_convert

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.export.formats import write_fused
from mlx_grpo.files.atomic import write_json
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.lora import load_adapter
from tests.helpers.tiny import write_model

MODES = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
IDS = mx.array([[257, 10, 20, 30, 40, 50]])
LORA = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}


@pytest.fixture(params=MODES, ids=lambda mode: mode[0])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model that mlx-lm quantized in one of the modes, with an adapter for it beside it."""
    mode, bits, group = request.param
    write_model(tmp_path / "dense")
    options = {"quantize": True, "q_mode": mode, "q_bits": bits, "q_group_size": group}
    mlx_convert(str(tmp_path / "dense"), str(tmp_path / "mlx"), dtype="bfloat16", **options)
    (tmp_path / "adapter").mkdir()
    arrays: dict[str, mx.array] = {}
    for i, key in enumerate(LORA["keys"]):
        wide = 64 if "down" in key else 32
        name = f"model.layers.1.{key}"
        arrays[f"{name}.lora_a"] = mx.random.normal((wide, 2), key=mx.random.key(i)) / 4
        arrays[f"{name}.lora_b"] = mx.random.normal((2, 32), key=mx.random.key(9 + i)) / 4
    save_arrays(tmp_path / "adapter" / "adapters.safetensors", arrays)
    about = {"fine_tune_type": "lora", "model": str(tmp_path / "mlx"), "num_layers": 1}
    write_json(tmp_path / "adapter" / "adapter_config.json", {**about, "lora_parameters": LORA})
    return tmp_path / "mlx"


def kl(before: Any, after: Any) -> float:
    """KL(before || after) per token."""
    p, q = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (before(IDS), after(IDS)))
    return float((mx.exp(p) * (p - q)).sum(-1).mean().item())


def test_a_source_is_kept_as_it_is(packed: Path, tmp_path: Path) -> None:
    row = convert_sft(locate(str(packed)), tmp_path / "out", Quantization(4), None)
    assert row.cost.kept
    stored, kept = (load_arrays(d / "model.safetensors") for d in (packed, row.path))
    assert stored.keys() == kept.keys()
    assert all(mx.array_equal(stored[n], kept[n]).item() for n in stored)


def test_a_fused_adapter_is_quantized_as_its_base_was(packed: Path, tmp_path: Path) -> None:
    row = convert_sft(locate(str(tmp_path / "adapter")), tmp_path / "out", Quantization(4), None)
    base = load_backbone(packed).model
    trained = load_adapter(base, tmp_path / "adapter")
    fused = load_backbone(row.path).model
    moved, rounding = kl(base, trained), kl(trained, fused)
    assert moved > 0.05 and rounding < moved / 3
    stored, made = (load_arrays(d / "model.safetensors") for d in (packed, row.path))
    assert {n: v.dtype for n, v in stored.items()} == {n: v.dtype for n, v in made.items()}


def test_a_dequantized_export_holds_floats_and_is_the_trained_model(
    packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_fused(out, tmp_path / "adapter", packed, dequantize=True, scratch=tmp_path)
    arrays = load_arrays(out / "model.safetensors")
    assert {v.dtype for v in arrays.values()} == {mx.bfloat16}
    trained = load_adapter(load_backbone(packed).model, tmp_path / "adapter")
    dense = load_backbone(out).model
    assert len(tree_flatten(dense.parameters())) == len(arrays)
    assert kl(trained, dense) < 1e-3
