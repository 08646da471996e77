"""PEFT's options: the numbers of peft itself, fused and as an adapter, or one line that says no."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import mlx.core as mx
import peft

from mlx_grpo.convert import reader
from mlx_grpo.convert.convert import convert_rm, convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.convert.tokenizer import copy_tokenizer
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.safetensors import load_arrays
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.reward_model import load_reward_model
from tests.helpers import sources
from tests.helpers.hf_models import TOKENS, found_logps, torch_logps, torch_score, widest

EXACT = Quantization(16)
OPTIONS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "alpha by layer": {"alpha_pattern": {"v_proj": 32, "layers.0.self_attn.o_proj": 2}},
    "rank by layer": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 16}},
    "rank and alpha by layer, rsLoRA": {
        "use_rslora": True,
        "r": 16,
        "rank_pattern": {r".*\.1\.self_attn\.k_proj": 4},
        "alpha_pattern": {"k_proj": 4},
    },
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "modules by a regular expression": {"target_modules": r".*layers\.0\..*(up|o)_proj"},
    "one block": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]},
    "the first block": {"target_modules": ["v_proj"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fused_adapter_is_w_plus_scale_b_a_rounded_once(name: str, tmp_path: Path) -> None:
    base = sources.causal(tmp_path / "base", "llama")
    options = {"task_type": "CAUSAL_LM", **OPTIONS[name]}
    adapted = sources.peft_adapter(tmp_path / "peft", tmp_path / "base", base, **options)
    expected = sources.merged(adapted)
    convert_sft(locate(str(tmp_path / "peft")), tmp_path / "out", EXACT, None)
    assert widest(found_logps(tmp_path / "out"), torch_logps(expected, TOKENS)) <= 1e-4
    stored = load_arrays(tmp_path / "out" / "model.safetensors")
    for key, value in expected.state_dict().items():
        if key in stored:
            assert (value.tolist() == stored[key].tolist()) or key == "lm_head.weight", key


@pytest.mark.parametrize("name", OPTIONS)
def test_a_reward_adapter_keeps_its_own_small_matrices(name: str, tmp_path: Path) -> None:
    causal = sources.causal(tmp_path / "base", "llama")
    model = sources.classifier(tmp_path / "unused", "llama")
    model.model.load_state_dict(causal.model.state_dict())
    options = {"task_type": "SEQ_CLS", **OPTIONS[name]}
    adapted = sources.peft_adapter(tmp_path / "peft", tmp_path / "base", model, **options)
    convert_sft(locate(str(tmp_path / "base")), tmp_path / "sft", EXACT, None)
    row = convert_rm(locate(str(tmp_path / "peft")), tmp_path / "rm", tmp_path / "sft", EXACT, None)
    assert row.form == "adapter"
    scores = load_reward_model(tmp_path / "rm", load_backbone(tmp_path / "sft"))
    found = scores.score_ids(tuple(TOKENS[:9]), [tuple(TOKENS[9:])])
    expected = torch_score(adapted, TOKENS)
    assert found == pytest.approx([expected], abs=1e-4)
    with adapted.disable_adapter():
        assert abs(torch_score(adapted, TOKENS) - expected) > 1e-2


def test_the_base_can_be_named_where_the_adapter_names_another_place(tmp_path: Path) -> None:
    base = sources.causal(tmp_path / "base", "llama")
    adapted = sources.peft_adapter(tmp_path / "peft", tmp_path / "gone", base)
    expected = sources.merged(adapted)
    source = locate(str(tmp_path / "peft"))
    with pytest.raises(InputError, match=r"peft: the base of this adapter cannot be used .*-base"):
        convert_sft(source, tmp_path / "out", EXACT, None)
    convert_sft(source, tmp_path / "out", EXACT, None, base=str(tmp_path / "base"))
    assert widest(found_logps(tmp_path / "out"), torch_logps(expected, TOKENS)) <= 1e-4


def test_a_base_that_is_an_adapter_or_a_reward_model_is_refused(tmp_path: Path) -> None:
    base = sources.causal(tmp_path / "base", "llama")
    sources.classifier(tmp_path / "rm", "llama")
    sources.peft_adapter(tmp_path / "first", tmp_path / "base", base)
    second = sources.causal(tmp_path / "base2", "llama")
    sources.peft_adapter(tmp_path / "second", tmp_path / "first", second)
    for name, complaint in (("first", "is an adapter too; merge"), ("rm", "is a reward model;")):
        with pytest.raises(InputError, match=f"second: its base .*{name} {complaint}"):
            source = locate(str(tmp_path / "second"))
            convert_sft(source, tmp_path / "out", EXACT, None, base=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["init_lora_weights", "layer_replication"])
def test_an_adapter_that_is_more_than_a_sum_is_refused(field: str, tmp_path: Path) -> None:
    base = sources.causal(tmp_path / "base", "llama")
    sources.peft_adapter(tmp_path / "peft", tmp_path / "base", base)
    place = tmp_path / "peft" / "adapter_config.json"
    value = "pissa_niter_4" if field == "init_lora_weights" else [[0, 1]]
    place.write_text(json.dumps({**json.loads(place.read_text()), field: value}))
    with pytest.raises(InputError, match=rf"adapter_config\.json: {field} .*merge_and_unload"):
        convert_sft(locate(str(tmp_path / "peft")), tmp_path / "out", EXACT, None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"adapter_config\.json: use_dora True is not converted; merge it"),
    "all biases": ({"bias": "all"}, r"adapter_config\.json: bias 'all' is not converted; merge it"),
    "biases of LoRA layers": ({"bias": "lora_only"}, r"bias 'lora_only' is not converted; merge"),
    "a trained embedding": (
        {"modules_to_save": ["embed_tokens"]},
        r"tensor 'model\.embed_tokens\.weight' is not a LoRA matrix; merge it with peft's merge_",
    ),
    "a trained head": (
        {"modules_to_save": ["lm_head"]},
        r"tensor 'lm_head\.weight' is not a LoRA matrix; merge it with peft's merge_and_unload",
    ),
    "a LoRA of the embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        r"tensor 'model\.embed_tokens\.lora_embedding_[AB]' is not a LoRA matrix",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_sum_is_refused(name: str, tmp_path: Path) -> None:
    options, complaint = REFUSED[name]
    base = sources.causal(tmp_path / "base", "llama", tie_word_embeddings=False)
    sources.peft_adapter(tmp_path / "peft", tmp_path / "base", base, **options)
    with pytest.raises(InputError, match=rf"^{tmp_path}/peft.*{complaint}"):
        convert_sft(locate(str(tmp_path / "peft")), tmp_path / "out", EXACT, None)
    assert not (tmp_path / "out").exists()


def test_another_method_than_lora_is_refused(tmp_path: Path) -> None:
    base = sources.causal(tmp_path / "base", "llama")
    method = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    peft.get_peft_model(base, method).save_pretrained(tmp_path / "peft")
    with pytest.raises(
        InputError, match=r"adapter_config\.json: peft_type 'IA3' is not LORA; merg"
    ):
        source = locate(str(tmp_path / "peft"))
        convert_sft(source, tmp_path / "out", EXACT, None, base=str(tmp_path / "base"))


def test_an_mlx_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    sources.causal(tmp_path / "base", "llama")
    sources.mlx_adapter(tmp_path / "lora", tmp_path / "base")
    place = tmp_path / "lora" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "fine_tune_type": "dora"}))
    complaint = r"adapter_config\.json: fine_tune_type 'dora' is not converted; fuse it with mlx_lm"
    with pytest.raises(InputError, match=complaint):
        convert_sft(locate(str(tmp_path / "lora")), tmp_path / "out", EXACT, None)


def test_a_tokenizer_of_its_own_leaves_the_stop_tokens_to_the_base(tmp_path: Path) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    for place in (base, own):
        place.mkdir()
        (place / "tokenizer_config.json").write_text("{}")
    (base / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    for name in ("out", "again"):
        (tmp_path / name).mkdir()
        copy_tokenizer(own, tmp_path / name, base)
        stops = {"out": [7, 8], "again": 9}[name]
        assert read_json(tmp_path / name / "generation_config.json")["eos_token_id"] == stops
        (own / "generation_config.json").write_text('{"eos_token_id": 9}')
    (base / "generation_config.json").write_text("{")
    (own / "generation_config.json").unlink()
    with pytest.raises(InputError, match=r"base/generation_config\.json"):
        copy_tokenizer(own, tmp_path / "out", base)


def test_an_adapter_beside_weights_that_mlx_lm_scales_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sources.causal(tmp_path / "base", "llama")
    sources.peft_adapter(tmp_path / "peft", tmp_path / "base", base, task_type="CAUSAL_LM")
    monkeypatch.setattr(reader, "_folds_multipliers", lambda config: True)
    with pytest.raises(InputError, match="merge it with PEFT first and convert the result"):
        convert_sft(locate(str(tmp_path / "peft")), tmp_path / "out", EXACT, None)
    assert not (tmp_path / "out").exists()


def test_only_multipliers_other_than_one_scale_weights() -> None:
    config = {"model_type": "falcon_h1", "mlp_multipliers": [1.0, 0.5], "key_multiplier": 1.0}
    assert reader._folds_multipliers(config)
    assert not reader._folds_multipliers({**config, "mlp_multipliers": [1.0, 1.0]})
    assert not reader._folds_multipliers({**config, "model_type": "llama"})


def test_a_reward_models_head_unties_nothing_in_either_part_of_a_configuration() -> None:
    head = {"weight": mx.zeros((1, 4))}
    nested = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    assert reader._with_head(nested, {}) == nested
    found = reader._with_head(nested, head)
    assert found["tie_word_embeddings"] and found["text_config"]["tie_word_embeddings"]
