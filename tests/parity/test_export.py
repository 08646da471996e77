"""Exports in transformers and Hugging Face PEFT: the logits they compute there, for each family."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import peft
import torch
import transformers

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.rng import key
from mlx_grpo.export.export import Export, export_run
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.lora import add_lora, load_adapter, lora_parameters, set_parameters
from tests.helpers import sources
from tests.helpers.hf_models import TOKENS, load_dequantized
from tests.helpers.runs import write_trained

BOUND = 1e-3


def adapted_run(root: Path, family: str, bits: int) -> tuple[Path, Any]:
    """(run with an adapter away from zero, torch model of its base with the same weights)."""
    model = sources.causal(root / "hf", family)
    sft, run = root / "sft", root / "run"
    convert_sft(locate(str(root / "hf")), sft, Quantization(bits, 32), None)
    if bits < 16:
        load_dequantized(model, sft)
    adapted = add_lora(load_backbone(sft).model, rank=4, scale=2.0, seed=0)
    drawn = {
        name: 0.1 * mx.random.normal(value.shape, key=key(0, name))
        for name, value in lora_parameters(adapted).items()
    }
    set_parameters(adapted, drawn)
    return write_trained(run, sft, adapted), model


def expected_logits(run: Path) -> mx.array:
    """Of the run's SFT model with its adapter, here, in fp32."""
    model = load_adapter(load_backbone(run.parent / "sft").model, run / "final")
    return model(mx.array([TOKENS]))[0]


def torch_logits(model: Any) -> mx.array:
    with torch.no_grad():
        return mx.array(model(torch.tensor([TOKENS])).logits[0].float().tolist())


def difference(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize("family", sources.FAMILIES)
def test_peft_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    run, base = adapted_run(tmp_path, family, bits=4)
    without = torch_logits(base)
    out = export_run(Export(run, "peft", base=str(tmp_path / "hf"))).directory
    loaded = peft.PeftModel.from_pretrained(base, out).eval()
    assert difference(torch_logits(loaded), expected_logits(run)) < BOUND
    assert difference(torch_logits(loaded), without) > 0.1


def test_peft_finds_base_and_tokenizer_by_itself(tmp_path: Path) -> None:
    run, _ = adapted_run(tmp_path, "llama", bits=16)
    out = export_run(Export(run, "peft", base=str(tmp_path / "hf"))).directory
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert difference(torch_logits(loaded), expected_logits(run)) < BOUND
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize("family", sources.FAMILIES)
def test_transformers_loads_a_dequantized_model(family: str, tmp_path: Path) -> None:
    run, base = adapted_run(tmp_path, family, bits=4)
    out = export_run(Export(run, "dequantized", verify=False)).directory
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    if family == "gemma":  # as in `write_hf`: mlx-lm computes the exact GELU
        for module in loaded.modules():
            if isinstance(module, transformers.activations.GELUTanh):
                module.act = torch.nn.functional.gelu
    here = load_backbone(out).model(mx.array([TOKENS]))[0]
    assert difference(torch_logits(loaded), here) < BOUND
    assert difference(torch_logits(base), here) > 0.1
