"""A mixture of experts with a LoRA on its experts, fused, read again, and refused where it must."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.output import lazily
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.export.formats import write_fused, write_peft
from mlx_grpo.models.lora import add_lora, lora_parameters, save_adapter, set_parameters
from tests.helpers.mixtures import mixture_config
from tests.helpers.tiny import write_model_of

TOKENS = mx.array([[5, 90, 17, 200, 33, 64, 7, 128]])


@pytest.fixture(scope="module", params=(4, 16))
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `sft` and `adapter`."""
    place = tmp_path_factory.mktemp("mixture")
    source = write_model_of(place / "source", mixture_config("qwen3_moe"))
    convert_sft(locate(str(source)), place / "sft", Quantization(request.param, 32), None)
    actor = add_lora(lazily(place / "sft")(), 4, 2.0, seed=1, expert_rank=2)
    before = lora_parameters(actor)
    set_parameters(
        actor, {n: mx.random.normal(v.shape, key=key(2, n)) / 4 for n, v in before.items()}
    )
    save_adapter(place / "adapter", actor)
    return place


def logits(model: Path, adapter: Path | None = None) -> mx.array:
    loaded = load(str(model), adapter_path=str(adapter) if adapter else None)[0]
    loaded.set_dtype(mx.float32)
    return loaded(TOKENS)


def test_a_fused_mixture_keeps_the_work_of_its_experts(adapted: Path, tmp_path: Path) -> None:
    sft, adapter = adapted / "sft", adapted / "adapter"
    (out := tmp_path / "fused").mkdir()
    write_fused(out, adapter, sft, True, tmp_path)
    wanted = logits(sft, adapter)
    scale = mx.abs(wanted).max().item()
    assert mx.abs(logits(out) - wanted).max().item() < 0.05 * scale  # rounded once to bf16
    assert mx.abs(logits(sft) - wanted).max().item() > 0.2 * scale


def test_a_converted_copy_of_a_fused_mixture_is_read_again(adapted: Path, tmp_path: Path) -> None:
    convert_sft(
        locate(str(adapted / "adapter")),
        tmp_path / "out",
        Quantization(4, 32),
        None,
        base=str(adapted / "sft"),
    )
    assert mx.isfinite(logits(tmp_path / "out")).all().item()


def test_peft_has_no_place_for_experts(adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"are experts, and a PEFT adapter has no place.*--fuse"):
        write_peft(tmp_path, adapted / "adapter", adapted / "sft", None)
    assert not list(tmp_path.glob("*.safetensors"))
