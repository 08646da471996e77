"""Log-probs of popular families, converted at 16 bits, against PyTorch's. `pytest -s` prints the
largest difference of each.
"""

from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("torch")

from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.directory import load_lazily
from tests.helpers.hf_models import torch_logps, widest
from tests.helpers.popular import GROUPED, POPULAR
from tests.helpers.tiny import BOS
from tests.helpers.variants import write_variant

TOKENS = [BOS, *((7 * i * i + 3 * i) % 256 for i in range(48))]
BOUND = 1e-4


def mlx_logps(directory: Path) -> list[float]:
    """Log-prob of each token but the first, computed in fp32."""
    model = load_lazily(directory)[0]
    apply_precision(model, Precision("cpu", dense=True, dtype=mx.float32))
    logits_TV = model(mx.array([TOKENS]))[0]
    logp_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
    return [logp_TV[t, token].item() for t, token in enumerate(TOKENS[1:])]


@pytest.mark.parametrize("name", POPULAR)
def test_log_probs_of_a_popular_family_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    model = write_variant(tmp_path / "hf", POPULAR[name])
    try:
        convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", Quantization(16), None)
    except InputError as e:
        if "cannot be trained here" not in str(e):
            raise
        pytest.skip(str(e).removeprefix(str(tmp_path)))  # its decoder is not taken apart
    gap = widest(torch_logps(model, TOKENS), mlx_logps(tmp_path / "out"))
    print(f"\n{name:<22} {gap:.1e}")
    assert gap < BOUND


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_mlx_lm_takes_together_are_refused(name: str, tmp_path: Path) -> None:
    write_variant(tmp_path / "hf", GROUPED[name])
    with pytest.raises(InputError, match=r"does not compute (mamba_)?n_groups 2|cannot be trained"):
        convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", Quantization(16), None)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_an_expert_that_is_missing_or_cut_is_refused_in_a_line(damage: str, tmp_path: Path) -> None:
    write_variant(tmp_path / "hf", POPULAR["qwen3_5_moe"])
    file = tmp_path / "hf" / "model.safetensors"
    arrays = load_arrays(file)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    up = arrays.pop(name)
    save_arrays(file, arrays if damage == "missing" else {**arrays, name: up[:-1]})
    with pytest.raises(InputError, match=r"experts\.0\.up_proj\.weight' has no place in this arch"):
        convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", Quantization(16), None)
    assert not (tmp_path / "out").exists()
