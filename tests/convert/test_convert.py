"""Language models from other libraries: the same numbers afterwards, or one line and no trace."""

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from tests.helpers.tiny import write_model

pytest.importorskip("torch")
from mlx_grpo.backend.precision import Precision
from mlx_grpo.convert import cost, output
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.output import lazily
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.decoder import Decoder
from tests.helpers.decoders import Doubling
from tests.helpers.hf_models import TOKENS, found_logps, save_hf, torch_logps, widest, write_hf

EXACT, PACKED = Quantization(16), Quantization(4, 32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {}),
}


def only(directory: Path, *names: str) -> bool:
    """Whether a directory holds just these entries, hidden ones included."""
    return sorted(p.name for p in directory.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", MODELS)
def test_at_16_bits_the_log_probs_are_those_of_torch(name: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[name]
    model = write_hf(tmp_path / "hf", architecture, **changes)
    row = convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    expected = torch_logps(model, TOKENS)
    assert max(expected) - min(expected) > 1  # a model that has something to lose
    assert widest(found_logps(tmp_path / "out"), expected) <= 1e-4
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.cost.describe() == "values kept"


def test_a_model_that_differs_from_its_parts_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "hf", "LlamaForCausalLM")

    def doubling(directory: Path) -> Callable[[], nn.Module]:
        def open_model() -> nn.Module:
            model = lazily(directory)()
            model.model.__class__ = Doubling
            return model

        return open_model

    monkeypatch.setattr(output, "lazily", doubling)
    for target in (EXACT, PACKED):
        with pytest.raises(InputError, match=r"hf: model type 'llama' .* hidden states differ by"):
            convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", target, None)
        assert only(tmp_path, "hf")


def test_the_cost_is_measured_with_one_head_in_memory_at_a_time(
    tmp_path: Path, prompt_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Decoder] = weakref.WeakSet()
    others, with_a_head = [], cost.without_blocks

    def noted(model: nn.Module, precision: Precision) -> Decoder:
        others.append(len(alive))
        decoder = with_a_head(model, precision)
        alive.add(decoder)
        return decoder

    monkeypatch.setattr(cost, "without_blocks", noted)
    write_hf(tmp_path / "hf", "LlamaForCausalLM")
    convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", PACKED, prompt_files[1])
    assert others == [0, 0]


@pytest.mark.parametrize("name", MODELS)
def test_at_4_bits_the_cost_is_measured_and_small(
    name: str, tmp_path: Path, prompt_files: tuple[Path, Path]
) -> None:
    architecture, changes = MODELS[name]
    model = write_hf(tmp_path / "hf", architecture, **changes)
    source, out = locate(str(tmp_path / "hf")), tmp_path / "out"
    row = convert_sft(source, out, PACKED, prompt_files[1])
    kl, before = row.cost.kl_per_token, row.cost.perplexity_before
    assert kl is not None and before is not None
    assert 0 < kl < 0.3 and math.isfinite(before)
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert 4 < row.bits_per_weight < 8  # the headers weigh something in so small a file
    assert 1e-3 < widest(found_logps(out), torch_logps(model, TOKENS)) < 2
    read, _ = mlx_lm.load(str(out))  # mlx-lm reads what is written, in bf16 as it likes
    logits_TV = read(mx.array([TOKENS]))[0].astype(mx.float32)
    logp_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
    own = [logp_TV[t, token].item() for t, token in enumerate(TOKENS[1:])]
    assert widest(own, found_logps(out)) < 0.1
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4


ROPE = {
    "another base": {"rope_type": "default", "rope_theta": 500.0},
    "llama 3's scaling": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear scaling": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize("architecture", ("LlamaForCausalLM", "Qwen2ForCausalLM"))
@pytest.mark.parametrize("case", ROPE)
def test_rotary_embeddings_as_transformers_5_writes_them_are_kept(
    architecture: str, case: str, tmp_path: Path
) -> None:
    model = write_hf(tmp_path / "hf", architecture, rope_parameters=ROPE[case])
    convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert widest(found_logps(tmp_path / "out"), torch_logps(model, TOKENS)) <= 1e-4


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf", "LlamaForCausalLM")
    save_hf(model, tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert widest(found_logps(tmp_path / "out"), torch_logps(model, TOKENS)) <= 1e-4


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf", "LlamaForCausalLM")
    (tmp_path / "hf" / "model.safetensors").unlink()
    save_hf(model, tmp_path / "hf", max_shard_size="20KB")
    sorted((tmp_path / "hf").glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(InputError, match=r"hf.*[Mm]issing"):
        convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert only(tmp_path, "hf")


@pytest.mark.parametrize("bits", (4, 8, 16))
def test_an_already_quantized_directory_is_kept_bit_for_bit(
    bits: int, sft: Path, tmp_path: Path, prompt_files: tuple[Path, Path]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    convert_sft(locate(str(sft)), first, PACKED, None)
    row = convert_sft(locate(str(first)), second, Quantization(bits), prompt_files[1])
    assert row.cost.describe() == "values kept"
    before, after = (load_arrays(d / "model.safetensors") for d in (first, second))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert mx.array_equal(value, after[name]).item(), name
    assert found_logps(first) == found_logps(second)


def test_floats_of_32_bits_are_rounded_once_to_bf16_and_the_cost_is_measured(
    sft: Path, tmp_path: Path, prompt_files: tuple[Path, Path]
) -> None:
    row = convert_sft(locate(str(sft)), tmp_path / "out", EXACT, prompt_files[1])
    before, after = (load_arrays(d / "model.safetensors") for d in (sft, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == mx.float32
        assert mx.array_equal(value.astype(mx.bfloat16), after[name]).item(), name
    assert row.cost.kl_per_token is not None and 0 < row.cost.kl_per_token < 1e-3
    again = convert_sft(locate(str(tmp_path / "out")), tmp_path / "twice", EXACT, prompt_files[1])
    assert again.cost.describe() == "values kept"
    assert found_logps(tmp_path / "twice") == found_logps(tmp_path / "out")


def damage(directory: Path, how: str) -> None:
    """Spoil a model directory."""
    file = directory / "model.safetensors"
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "cut in the header":
        file.write_bytes(file.read_bytes()[:500])
    elif how == "pickled":
        file.rename(directory / "pytorch_model.bin")
    elif how == "other architecture":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    elif how == "no configuration":
        (directory / "config.json").unlink()
    else:
        arrays = load_arrays(file)
        name = "model.layers.1.mlp.up_proj.weight"
        if how == "a tensor missing":
            arrays.pop(name)
        elif how == "NaN":
            arrays[name][3, 5] = math.nan
        elif how == "another shape":
            arrays[name] = arrays[name][:, :16]
        save_arrays(file, arrays)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("cut short", r"model\.safetensors"),
        ("cut in the header", r"model\.safetensors"),
        ("pickled", r"pytorch_model\.bin: damaged, incomplete, or more than plain weights"),
        ("other architecture", "unheard_of"),
        ("no configuration", r"neither config\.json nor adapter_config\.json is here; give"),
        ("a tensor missing", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("NaN", r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds values that are not fin"),
        ("another shape", r"model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_a_source_is_refused_without_a_trace_when(how: str, complaint: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    damage(source, how)
    with pytest.raises(InputError, match=rf"^{source}.*{complaint}"):
        convert_sft(locate(str(source)), tmp_path / "out", PACKED, None)
    assert only(tmp_path, "source")
