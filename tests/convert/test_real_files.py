"""Directories as people have them: read as transformers reads them, or the true cause is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from mlx_grpo.convert.convert import Checks, convert_rm, convert_sft
from mlx_grpo.convert.gguf import read_gguf
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate, needed_files
from mlx_grpo.convert.translate import translated
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.directory import check_length, load_lazily
from mlx_grpo.models.reward_model import TextForm, load_reward_model
from tests.helpers import sources
from tests.helpers.hf_models import TOKENS, found_logps, torch_logps, widest
from tests.helpers.tiny import write_model, write_tokenizer
from tests.helpers.variants import VARIANTS, write_variant

EXACT, PACKED = Quantization(16), Quantization(4, 32)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
INDEX = "model.safetensors.index.json"


def configure(directory: Path, file: str = "config.json", **fields: Any) -> None:
    """Other fields in a JSON file."""
    about = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(about | fields))


def refused(source: Path, tmp_path: Path, **options: Any) -> str:
    """What the refusal of an SFT model says."""
    with pytest.raises(InputError) as error:
        convert_sft(locate(str(source)), tmp_path / "out", EXACT, None, **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_a_stale_index_beside_a_whole_file_is_ignored(tmp_path: Path) -> None:
    model = sources.causal(tmp_path / "hf", "llama")
    shards = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": shards}))
    convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert widest(found_logps(tmp_path / "out"), torch_logps(model, TOKENS)) < 1e-4


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_one(file: str, tmp_path: Path) -> None:
    sources.causal(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / file).write_bytes(POINTER)
    assert f"{file}: a Git LFS pointer, not the file itself" in refused(tmp_path / "hf", tmp_path)


def test_an_adapter_beside_a_config_json_is_an_adapter(tmp_path: Path) -> None:
    model = sources.causal(tmp_path / "base", "llama")
    adapted = sources.peft_adapter(tmp_path / "peft", tmp_path / "base", model)
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "peft")
    convert_sft(locate(str(tmp_path / "peft")), tmp_path / "out", EXACT, None)
    expected = torch_logps(sources.merged(adapted), TOKENS)
    assert widest(found_logps(tmp_path / "out"), expected) < 1e-4


def test_a_model_and_an_adapter_in_one_directory_are_not_guessed_between(tmp_path: Path) -> None:
    model = sources.causal(tmp_path / "base", "llama")
    sources.peft_adapter(tmp_path / "peft", tmp_path / "base", model)
    shutil.copytree(tmp_path / "base", tmp_path / "peft", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"holds a model \(\S+\) and an adapter"):
        locate(str(tmp_path / "peft"))


def test_of_a_hub_adapter_with_a_config_json_the_adapter_is_fetched() -> None:
    files = ["config.json", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"]
    assert sorted(needed_files(files)) == sorted(files[:3])


def test_a_padding_token_behind_the_embedding_is_taken_out(tmp_path: Path) -> None:
    source = write_model(tmp_path / "mlx")
    about = json.loads((source / "tokenizer.json").read_text())
    extra = {**about["added_tokens"][0], "id": 260, "content": "[PAD]"}
    configure(source, "tokenizer.json", added_tokens=[*about["added_tokens"], extra])
    configure(source, "tokenizer_config.json", pad_token="[PAD]")
    row = convert_sft(locate(str(source)), tmp_path / "out", PACKED, None)
    assert "the padding token '[PAD]' is number 260 and the model embeds 260" in row.notes[0]
    tokenizer = load_backbone(row.path).tokenizer
    assert max(tokenizer.get_vocab().values()) < 260
    assert max(tokenizer.encode("a [PAD] b")) < 260
    configure(source, "tokenizer_config.json", pad_token="<pad>")
    assert "'[PAD]' is number 260, the model embeds 260" in refused(source, tmp_path / "again")


@pytest.mark.parametrize("name", ["exp [v1]", "a*b?"])
def test_a_path_with_the_characters_of_a_pattern_is_a_path(name: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / name)
    model, _ = load_lazily(directory)
    assert model(mx.array([[1]])).shape == (1, 1, 260)


def test_a_part_of_a_split_gguf_is_called_one(tmp_path: Path) -> None:
    part = tmp_path / "m-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="one of 3 parts of a split GGUF"):
        read_gguf(part)


def test_a_head_of_its_own_wins_over_tie_word_embeddings(tmp_path: Path) -> None:
    model = sources.causal(tmp_path / "hf", "llama", tie_word_embeddings=False)
    configure(tmp_path / "hf", tie_word_embeddings=True)
    convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert widest(found_logps(tmp_path / "out"), torch_logps(model, TOKENS)) < 1e-4


def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    sources.causal(tmp_path / "hf", "llama", tie_word_embeddings=True)
    arrays = load_arrays(tmp_path / "hf" / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    save_arrays(tmp_path / "hf" / "model.safetensors", arrays)
    row = convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    assert "lm_head.weight" not in load_arrays(row.path / "model.safetensors")


def test_a_head_that_the_family_cannot_have_is_refused_by_name(tmp_path: Path) -> None:
    sources.causal(tmp_path / "hf", "gemma")
    arrays = load_arrays(tmp_path / "hf" / "model.safetensors")
    arrays["lm_head.weight"] = 2 * arrays["model.embed_tokens.weight"]
    save_arrays(tmp_path / "hf" / "model.safetensors", arrays)
    assert "lm_head.weight" in refused(tmp_path / "hf", tmp_path)


def test_an_adapter_of_a_multimodal_model_finds_its_layers(tmp_path: Path) -> None:
    name = "mistral3, theta 1e9"
    model = write_variant(tmp_path / "base", VARIANTS[name])
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = sources.peft_adapter(tmp_path / "peft", tmp_path / "base", model, **options)
    stored = load_arrays(tmp_path / "peft" / "adapter_model.safetensors")
    assert any("language_model" in tensor for tensor in stored)
    convert_sft(locate(str(tmp_path / "peft")), tmp_path / "out", EXACT, None)
    expected = torch_logps(sources.merged(adapted), TOKENS)
    assert widest(found_logps(tmp_path / "out"), expected) < 1e-4


def test_allowing_a_mismatch_converts_and_says_what_is_missing(tmp_path: Path) -> None:
    write_variant(tmp_path / "hf", VARIANTS["qwen2_moe norm_topk"])
    allowed = Checks(allow_mismatch=True)
    row = convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None, checks=allowed)
    assert row.notes == (
        "another model than the source: mlx-lm does not compute norm_topk_prob True",
    )


@pytest.mark.parametrize("name", ["mistral wide window", "phi3 longrope, long"])
def test_a_length_from_which_models_part_is_told(name: str, tmp_path: Path) -> None:
    write_variant(tmp_path / "hf", VARIANTS[name])
    row = convert_sft(locate(str(tmp_path / "hf")), tmp_path / "out", EXACT, None)
    limit = 4096 if "mistral" in name else 2048
    assert f"the same model as the source for texts of up to {limit} tokens" in row.notes[0]
    config = json.loads((row.path / "config.json").read_text())
    check_length(row.path, config, limit)
    with pytest.raises(InputError, match=rf"up to {limit} tokens; .* allow {limit + 1}"):
        check_length(row.path, config, limit + 1)


def test_translating_twice_changes_nothing(tmp_path: Path) -> None:
    for name in ("phi3 longrope, attention_factor", "llama yarn attention_factor", "gpt_neox"):
        write_variant(tmp_path / name, VARIANTS[name])
        once = translated(json.loads((tmp_path / name / "config.json").read_text()))
        assert translated(once) == once


def test_a_family_s_own_group_size_that_does_not_divide_gives_way_to_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    def finer(self: Any, path: str, module: Any) -> Any:
        return {"group_size": 64, "bits": 8} if "down_proj" in path else True

    monkeypatch.setattr(llama.Model, "quant_predicate", finer, raising=False)
    source = write_model(tmp_path / "mlx")
    arrays = load_arrays(source / "model.safetensors")
    for name, value in arrays.items():
        if "mlp.down_proj" in name:
            arrays[name] = value[:, :32]
        elif "mlp" in name:
            arrays[name] = value[:32]
    save_arrays(source / "model.safetensors", arrays)
    configure(source, intermediate_size=32)
    convert_sft(locate(str(source)), tmp_path / "out", PACKED, None)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert stored["model.layers.0.mlp.down_proj"] == {"group_size": 32, "bits": 8}
    mlx_lm.load(str(tmp_path / "out"))


THINKING = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{% if m['role'] == 'assistant' and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_reward_model_s_template_gets_no_argument_that_its_training_did_not_give(
    tmp_path: Path,
) -> None:
    sources.classifier(tmp_path / "rm", "llama")
    write_tokenizer(tmp_path / "rm", THINKING)
    source = locate(str(tmp_path / "rm"))
    row = convert_rm(source, tmp_path / "out", tmp_path / "none", EXACT, None)
    model = load_reward_model(row.path, load_backbone(row.path))
    ask = ({"role": "user", "content": "why?"},)
    group = Group(Prompt("p", ask, (1, 2)), (Completion((9,), "so.", "stop", (0.0,)),))
    prefix, rows = model.inputs(group)
    assert "think" not in model.tokenizer.decode([*prefix, *rows[0]])
    about = json.loads((row.path / "reward_model.json").read_text())
    del about["chat_template_arguments"]  # as in a directory that was made here before
    ids = TextForm.of(about).ids(model.tokenizer, ask, "so.")
    assert "think" in model.tokenizer.decode(ids)
