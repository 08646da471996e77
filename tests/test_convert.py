"""Language models from other libraries: the same numbers afterwards, or one line and no trace."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from conftest import write_model

pytest.importorskip("torch")
from hf_models import torch_logps, write_hf

from mlx_grpo import convert
from mlx_grpo.convert import Quantization, convert_sft, locate
from mlx_grpo.errors import InputError
from mlx_grpo.models.lora import load_arrays, save_arrays

TOKENS = [257, *((7 * i * i + 3 * i) % 256 for i in range(24))]
EXACT, PACKED = Quantization(16), Quantization(4, 32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {}),
}


def mlx_logps(directory: Path) -> list[float]:
    """Log-prob of each of TOKENS but the first, under a directory read by mlx-lm itself."""
    model, _ = mlx_lm.load(str(directory))
    logits_TV = model(mx.array([TOKENS]))[0].astype(mx.float32)
    logp_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
    return [logp_TV[t, token].item() for t, token in enumerate(TOKENS[1:])]


def widest(a: list[float], b: list[float]) -> float:
    """Largest absolute difference."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


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
    assert widest(mlx_logps(tmp_path / "out"), expected) <= 1e-4
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.cost.describe() == "values kept"


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
    assert 1e-3 < widest(mlx_logps(out), torch_logps(model, TOKENS)) < 2
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
    assert widest(mlx_logps(tmp_path / "out"), torch_logps(model, TOKENS)) <= 1e-4


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf", "LlamaForCausalLM")
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    (tmp_path / "hf" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert widest(mlx_logps(tmp_path / "out"), torch_logps(model, TOKENS)) <= 1e-4


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf", "LlamaForCausalLM")
    (tmp_path / "hf" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
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
    assert mlx_logps(first) == mlx_logps(second)


def test_a_full_precision_mlx_directory_keeps_its_values(sft: Path, tmp_path: Path) -> None:
    convert_sft(locate(str(sft)), tmp_path / "out", EXACT, None)
    assert mlx_logps(tmp_path / "out") == mlx_logps(sft)


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
        ("pickled", r"no model\*\.safetensors; save the model with safe_serialization=True"),
        ("other architecture", "unheard_of"),
        ("no configuration", r"no config\.json; give a model directory"),
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


def test_a_crash_midway_leaves_nothing_and_keeps_what_was_there(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes_half(directory: Path, *_: Any) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(convert, "write_model", writes_half)
        with pytest.raises(OSError, match="No space left"):
            convert_sft(locate(str(sft)), out, PACKED, None)
        assert only(tmp_path)
    convert_sft(locate(str(sft)), out, PACKED, None)
    good = mlx_logps(out)
    monkeypatch.setattr(convert, "write_model", writes_half)
    with pytest.raises(OSError, match="No space left"):
        convert_sft(locate(str(sft)), out, PACKED, None, replace=True)
    assert only(tmp_path, "out")
    assert mlx_logps(out) == good
