"""GGUF: the log-probs of the model it was made from, tensor type by tensor type, and its tokenizer.

The files are written here as llama.cpp writes them, rows of q and k reordered.
"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.backbone import load_backbone
from tests.helpers.gguf_writer import VOCABULARY, write_tiny
from tests.helpers.tiny import (
    tiny_model,
    write_tokenizer,
)

TOKENS = [257, *((7 * i * i + 3 * i) % 256 for i in range(24))]


def logps(model: Any) -> mx.array:
    """Log-probs over the vocabulary at every position of TOKENS."""
    logits_TV = model(mx.array([TOKENS]))[0].astype(mx.float32)
    return logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)


def widest(a: mx.array, b: mx.array) -> float:
    """Largest absolute difference."""
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("F32", 16), ("F16", 16), ("Q8_0", 4), ("Q4_0", 4), ("Q4_1", 4), ("mixed", 4)],
)
def test_the_log_probs_of_the_model_are_restored(kind: str, bits: int, tmp_path: Path) -> None:
    original = write_tiny(tmp_path / "m.gguf", kind)
    row = convert_sft(
        locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(bits, 32), None
    )
    assert widest(logps(load_backbone(tmp_path / "out").model), logps(original)) <= 1e-4
    assert widest(logps(tiny_model("llama", seed=4)), logps(original)) > 1
    assert row.parameters == sum(v.size for _, v in tree_flatten(original.parameters()))


@pytest.mark.parametrize("kind", ("F16", "Q8_0", "Q4_0", "Q4_1", "mixed"))
def test_in_fp32_the_restored_weights_are_exact(kind: str, tmp_path: Path) -> None:
    original = write_tiny(tmp_path / "m.gguf", kind)
    convert_sft(locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(16), None)
    backbone = load_backbone(tmp_path / "out")
    if not backbone.precision.dense:
        pytest.skip("this backend keeps weights packed")
    restored = dict(tree_flatten(backbone.model.parameters()))
    for name, value in tree_flatten(original.parameters()):
        assert widest(restored[name], value) <= 1e-6, name


def test_a_full_precision_file_is_quantized_and_the_cost_measured(
    tmp_path: Path, prompt_files: tuple[Path, Path]
) -> None:
    write_tiny(tmp_path / "m.gguf", "F32")
    source, out = locate(str(tmp_path / "m.gguf")), tmp_path / "out"
    row = convert_sft(source, out, Quantization(4, 32), prompt_files[1])
    assert row.cost.kl_per_token is not None
    assert 0 < row.cost.kl_per_token < 0.5 and math.isfinite(row.cost.perplexity_after or math.nan)


def test_a_quantized_file_keeps_its_values_and_says_so(
    tmp_path: Path, prompt_files: tuple[Path, Path]
) -> None:
    write_tiny(tmp_path / "m.gguf", "Q4_1")
    source, out = locate(str(tmp_path / "m.gguf")), tmp_path / "out"
    row = convert_sft(source, out, Quantization(4, 64), prompt_files[1])
    assert row.cost.describe() == "values kept"
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"]["group_size"] == 32


def test_the_tokenizer_is_rebuilt_from_the_metadata(tmp_path: Path) -> None:
    changes = {
        "tokenizer.ggml.tokens": [*VOCABULARY[:-1], "he"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3 + [1],
        "tokenizer.ggml.merges": ["h e"],
    }
    write_tiny(tmp_path / "m.gguf", "F32", **changes)
    convert_sft(locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(16), None)
    (tmp_path / "byte").mkdir()
    write_tokenizer(tmp_path / "byte")
    rebuilt, known = (mlx_lm.utils.load_tokenizer(tmp_path / d) for d in ("out", "byte"))
    text = "Why 42?\n<user>é 你</s><assistant>  the end"
    ids = rebuilt.encode(text, add_special_tokens=False)
    assert ids[-5] == 259  # "he" of "the", merged
    h, e = (VOCABULARY.index(c) for c in "he")
    apart = [i for token in ids for i in ((h, e) if token == 259 else (token,))]
    assert apart == known.encode(text, add_special_tokens=False)
    assert rebuilt.decode(ids) == text
    messages = [{"role": "user", "content": "hi"}]
    assert rebuilt.apply_chat_template(messages) == known.apply_chat_template(messages)
    assert (rebuilt.eos_token, rebuilt.bos_token, rebuilt.pad_token) == ("</s>", "<s>", "<pad>")


@pytest.mark.parametrize("kind", ("Q5_0", "Q4_K"))
def test_a_tensor_type_that_mlx_does_not_read_exactly_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "m.gguf", kind)
    with pytest.raises(InputError, match=r"m\.gguf: tensor '\S+\.weight' has ggml type .* use a f"):
        convert_sft(locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(), None)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"general.architecture": "phi2"}, "architecture 'phi2' is not supported; use 'llama'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' with pre-tokenizer 'gpt-2' is not"),
        ({"tokenizer.chat_template": None}, "no chat template"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling is not converted"),
        ({"tokenizer.ggml.merges": None}, r"damaged tokenizer metadata: .*merges"),
        ({"tokenizer.ggml.token_type": [1]}, r"damaged tokenizer metadata: "),
        ({"llama.rope.freq_base": None}, r"llama\.rope\.freq_base"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_a_trace(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "m.gguf", "F32", **changes)
    with pytest.raises(InputError, match=rf"m\.gguf.*{complaint}"):
        convert_sft(locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(4, 32), None)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("length", (0, 3, 20, 200, 5000, -3000))
def test_a_file_cut_short_is_refused(length: int, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "F32")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:length])
    with pytest.raises(InputError, match=r"m\.gguf: "):
        convert_sft(locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(), None)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match=r"m\.gguf: not a GGUF file"):
        convert_sft(locate(str(tmp_path / "m.gguf")), tmp_path / "out", Quantization(), None)
