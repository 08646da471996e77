"""A sweep over architectures and settings of transformers: what is converted agrees with PyTorch,
and what mlx-lm computes differently is refused in one line. `pytest -s` prints each outcome.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("torch")
import torch

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.backbone import load_backbone
from tests.helpers.tiny import BOS
from tests.helpers.variants import VARIANTS, write_variant

IDS = [BOS, *((7 * i * i + 3 * i) % 256 for i in range(48))]
BOUND = 1e-5
REFUSALS = {
    "mlx-lm does not compute truncate False of rope_type 'yarn' for": (
        "llama yarn truncate",
        "gpt_oss",
    ),
    "texts of up to 128 tokens only": ("llama longrope", "phi3 longrope"),
    "hidden_act 'gelu' is not what mlx-lm computes": ("llama gelu",),
    "texts of up to 8 tokens only": (
        "mistral window",
        "qwen2 window",
        "qwen3 window",
        "gemma2 window",
        "phi3 window",
        "mixtral window",
        "qwen3_moe window",
        "starcoder2 window",
    ),
    "has no place in this architecture": (
        "qwen3 bias",
        "phi qk_layernorm",
        "qwen2_moe mlp_only",
        "nanochat",
        "llama4_text",
    ),
    "this architecture cannot be trained here": (
        "gemma2 no softcap",
        "gemma3_text layer_types",
        "llama dynamic",
    ),
    "mlx-lm does not compute scale_attn_by_inverse_layer_idx True": ("gpt2 inverse layer idx",),
    "mlx-lm does not compute final_logit_softcapping 5.0 for": ("gemma3_text softcap",),
    "mlx-lm does not compute use_bidirectional_attention True for": ("gemma3_text bidirectional",),
    "tensor 'lm_head.bias' is missing": ("phimoe",),
    "mlx-lm does not compute norm_topk_prob True for": ("qwen2_moe norm_topk",),
    "needs a package that is not": ("olmo", "olmo clip_qkv"),
    "mlx-lm does not compute clip_qkv 0.5 for": ("olmoe clip_qkv",),
    "has shape": (
        "gpt_neox sequential",
        "gpt_neox partial",
        "bitnet",
        "falcon_h1",
        "recurrent_gemma",
    ),
    "no model can be built of this": ("gpt_bigcode", "lfm2"),
    "mlx-lm does not compute partial_rotary_factor 0.5 for": ("glm",),
    "mlx-lm does not compute tensor 'model.layers.1.mlp.moe_statics.e_score_correction_bias' for": (
        "ernie4_5_moe",
    ),
    "tensor 'model.layers.0.block_sparse_moe.e_score_correction_bias' is missing": ("minimax",),
    "not supported": ("arcee", "opt", "falcon", "bloom", "vaultgemma"),
}
"""What a refusal says, and of which variants; every other one converts."""
REFUSED = {name: why for why, names in REFUSALS.items() for name in names}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, str]]:
    """What became of each variant, printed in the end."""
    found: dict[str, str] = {}
    yield found
    print("\n" + "\n".join(f"{name:<34} {what}" for name, what in found.items()))
    print(f"{len(found)} variants, {sum(w.startswith('KL') for w in found.values())} converted")


def kl_per_token(model: Any, directory: Path) -> float:
    """KL(PyTorch || MLX), nats per token."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([IDS])).logits[0]
    found_TV = load_backbone(directory).model(mx.array([IDS]))[0].astype(mx.float32)
    p, q = (torch.log_softmax(z.double(), -1) for z in (logits_TV, torch.tensor(found_TV.tolist())))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_agrees_with_pytorch_or_is_refused_in_a_line(
    name: str, tmp_path: Path, outcomes: dict[str, str]
) -> None:
    model = write_variant(tmp_path / "hf", VARIANTS[name])
    out = tmp_path / "out"
    try:
        convert_sft(locate(str(tmp_path / "hf")), out, Quantization(16), None)
    except InputError as e:
        outcomes[name] = f"refused: {str(e).removeprefix(str(tmp_path))}"
        assert "\n" not in str(e) and not out.exists()
        assert name in REFUSED and REFUSED[name] in str(e)
        return
    kl = kl_per_token(model, out)
    outcomes[name] = f"KL {kl:.1e}"
    assert name not in REFUSED
    assert kl < BOUND
