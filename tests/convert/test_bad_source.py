"""Sources that are wrong in a way with a name: each is refused with the file and the tensor to
blame, through the real command, and nothing is left behind.
"""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from tests.helpers.tiny import CHAT_TEMPLATE, write_tokenizer

pytest.importorskip("torch")
pytest.importorskip("peft")
from tests.helpers.damage import (
    UP,
    Damage,
    Evil,
    added,
    arrays,
    both,
    empty,
    fields,
    many_tokens,
    missing,
    nan_in_bin,
    outside,
    pickled,
    put,
    shard_twice,
    tensor,
    value,
    without,
)

NAN, INF = float("nan"), float("inf")
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
FIRST = "model-00001-of-*.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
all_nan = arrays(lambda a: a.update({n: put(v, NAN) for n, v in a.items()}), FIRST)

CASES: dict[str, tuple[str, Damage, str]] = {
    "NaN": ("sft", value(UP, NAN), rf"/model\.safetensors: tensor '{UP}' holds values that"),
    "infinity": ("sft", value(UP, INF), rf"tensor '{UP}' holds values that are not finite"),
    "minus infinity": ("sft", value("model.norm.weight", -INF), r"'model\.norm\.weight' ho"),
    "a huge number": ("sft", value(UP, 1e30), rf"'{UP}' holds values beyond 1048576; the file is"),
    "NaN in a shard": (
        "sharded",
        all_nan,
        r"/model-00001-of-\d+\.safetensors: tensor '\S+' holds values that are not",
    ),
    "NaN in a .bin": ("bin", nan_in_bin, rf"/pytorch_model\.bin: tensor '{UP}' holds values that"),
    "NaN in the head": (
        "rm",
        value("score.weight", NAN),
        r"/model\.safetensors: tensor 'score\.weight' holds",
    ),
    "NaN in LoRA": (
        "peft",
        value(f"{Q}.lora_A.weight", NAN, ADAPTER),
        rf"/{ADAPTER}: tensor '\S+q_proj\.lora_A\.weight' holds values",
    ),
    "a column missing": (
        "sft",
        tensor(UP, lambda v: v[:, :-1]),
        rf"/model\.safetensors: tensor '{UP}' has shape \[64, 31\], config\.json wants \[64, 32\]",
    ),
    "a transposed tensor": ("sft", tensor(UP, lambda v: v.T), rf"'{UP}' has shape \[32, 64\]"),
    "a vector for a matrix": ("rm", tensor(UP, lambda v: v[0]), rf"'{UP}' has shape \[32\]"),
    "a tensor missing": ("sft", missing(UP), rf"tensor '{UP}' is missing"),
    "a tensor too many": (
        "sft",
        added(model__extra=(3,)),
        r"/model\.safetensors: tensor 'model\.extra' has no place in this arch",
    ),
    "a block too many": (
        "sft",
        fields(num_hidden_layers=3),
        r"tensor 'model\.layers\.2\.\S+' is missing",
    ),
    "a block too few": (
        "sft",
        fields(num_hidden_layers=1),
        r"tensor 'model\.layers\.1\.\S+' has no place",
    ),
    "integers": (
        "sft",
        tensor(UP, lambda v: v.astype(mx.int32)),
        rf"'{UP}' has dtype I32, which is not read here; save",
    ),
    "no weights": ("sft", without("model.safetensors"), r": no model\*\.safetensors here; save"),
    "a shard missing": (
        "sharded",
        without("model-00002-of-*"),
        r"/model-00002-of-\d+\.safetensors: missing; it holds tensor '\S+'",
    ),
    "a shard missing, no index": (
        "sharded",
        both(without("model-00002-of-*"), without("*.index.json")),
        r"/model-00001-of-\d+\.safetensors: one of \d+ files, of which \d+ are here; fetch",
    ),
    "a tensor in two shards": (
        "sharded",
        shard_twice,
        r"/model-00002-of-\S+: tensor '\S+' is in model-00001-of-\S+ as well",
    ),
    "an index that leads elsewhere": (
        "sharded",
        outside,
        rf"/model\.safetensors\.index\.json: tensor '{UP}' is listed as outside",
    ),
    "an index of another kind": (
        "sharded",
        fields(INDEX, weight_map=[1]),
        r"/model\.safetensors\.index\.json: field 'weight_map' must give",
    ),
    "an empty shard": (
        "sharded",
        empty(FIRST),
        r"/model-00001-of-\d+\.safetensors: not a whole safetensors",
    ),
    "an empty .bin": (
        "bin",
        empty("pytorch_model.bin"),
        r"/pytorch_model\.bin: damaged, incomplete, or more than plain weights",
    ),
    "a .bin with code": (
        "bin",
        pickled({"w": Evil()}),
        r"/pytorch_model\.bin: damaged, incomplete, or more than plain weights",
    ),
    "a .bin of another kind": (
        "bin",
        pickled([1, 2]),
        r"/pytorch_model\.bin: holds something other than named tensors",
    ),
    "an unknown architecture": (
        "sft",
        fields(model_type="unheard_of", architectures=["X"]),
        r"/config\.json: .*unheard_of not supported",
    ),
    "no model_type": (
        "sft",
        fields(model_type="out"),
        r"/config\.json: no model can be built of this: 'model_type'",
    ),
    "another quantization": (
        "sft",
        fields(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"/config\.json: quantized with gptq, which is not converted; give the model in 16 bits",
    ),
    "two labels": (
        "rm",
        added(score__weight=(2, 32)),
        r"/model\.safetensors: tensor 'score\.weight' has shape \[2, 32\]; .* has one label",
    ),
    "a narrow head": (
        "rm",
        added(score__weight=(1, 16)),
        r"tensor 'score\.weight', has width 16, the model's hidden size is 32",
    ),
    "no head": (
        "rm",
        missing("score.weight"),
        r"/model\.safetensors: tensor 'score\.weight' is missing; this model has no reward head",
    ),
    "two biases": (
        "rm",
        added(score__bias=(2,)),
        r"/model\.safetensors: tensor 'score\.bias' has shape \[2\]",
    ),
    "no configuration": (
        "sft",
        without("config.json"),
        r": neither config\.json nor adapter_config\.json is here",
    ),
    "an empty configuration": ("sft", empty("config.json"), r"/config\.json: not valid JSON"),
    "no tokenizer": (
        "sft",
        without("tokenizer_config.json"),
        r": tokenizer_config\.json is missing",
    ),
    "no tokens": ("sft", without("tokenizer.json"), r": cannot load the tokenizer"),
    "an empty tokenizer": ("sft", empty("tokenizer.json"), r"/tokenizer\.json: not valid JSON"),
    "another model's tokenizer": (
        "sft",
        many_tokens,
        r"/tokenizer\.json: token '<more>' is number 999, the model embeds 260; this is another",
    ),
    "no chat template": (
        "sft",
        lambda s: write_tokenizer(s, None),
        r"/tokenizer_config\.json: no chat template; use an instr",
    ),
    "a broken chat template": (
        "rm",
        lambda s: write_tokenizer(s, CHAT_TEMPLATE[:-12]),
        r": the chat template cannot be applied: ",
    ),
    "tokens of another type": (
        "sft",
        fields("tokenizer.json", model=5),
        r": cannot load the tokenizer",
    ),
    "half a LoRA": (
        "peft",
        missing(f"{Q}.lora_B.weight", ADAPTER),
        rf"/{ADAPTER}: tensor '\S+q_proj\.lora_B\.weight' is missing",
    ),
    "a LoRA of another width": (
        "peft",
        tensor(f"{Q}.lora_A.weight", lambda v: mx.zeros((4, 48)), ADAPTER),
        r": LoRA of '\S+q_proj' has shapes \[48, 4\] and \[4, 32\], the base's layer is",
    ),
    "a LoRA of another rank": (
        "peft",
        tensor(f"{Q}.lora_B.weight", lambda v: v[:, :3], ADAPTER),
        r": LoRA of '\S+q_proj' has shapes",
    ),
    "a LoRA without a layer": (
        "peft",
        added(ADAPTER, x__lora_A__weight=(2, 2), x__lora_B__weight=(2, 2)),
        r": the base model has no linear layer 'x'",
    ),
    "no LoRA file": ("peft", without(ADAPTER), r": no adapter_model\*\.safetensors here"),
    "no base named": (
        "peft",
        fields("adapter_config.json", base_model_name_or_path=None),
        r": this adapter does not say which model it belongs to; give --sft-base or",
    ),
    "a base that is gone": (
        "rm-peft",
        fields("adapter_config.json", base_model_name_or_path="./gone"),
        r": the base of this adapter cannot be used \(\./gone: no such directory",
    ),
    "no alpha": (
        "peft",
        fields("adapter_config.json", lora_alpha="out"),
        r"/adapter_config\.json: field 'lora_alpha' is missing or not a number",
    ),
    "an adapter's head of two labels": (
        "rm-peft",
        added(ADAPTER, base_model__model__score__weight=(2, 32)),
        r": tensor 'score\.weight' has shape \[2, 32\]",
    ),
    "an empty GGUF": ("gguf", empty("m.gguf"), r"/m\.gguf: the file is empty; fetch it again"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_the_place_to_blame(
    name: str,
    convert_damaged: Callable[..., str | None],
    source_copy: Callable[[str], Path],
) -> None:
    kind, damage, complaint = CASES[name]
    source = source_copy(kind)
    damage(source)
    found = convert_damaged(kind, source)
    assert found is not None and re.search(complaint, found), found
    assert not Path("unpickled").exists()
