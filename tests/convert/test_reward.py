"""Reward models from other libraries: the scores of the original, whatever surrounds a row."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.helpers.tiny import write_model

pytest.importorskip("torch")
from mlx_grpo.convert import convert
from mlx_grpo.convert.convert import convert_rm
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.reward_model import load_reward_model
from tests.helpers.hf_models import torch_score, write_hf

FAMILIES = ("Llama", "Qwen2", "Gemma")
PROMPT = tuple((11 * i + 5) % 256 for i in range(9))
ROWS = [tuple((i * i + 7 * k) % 256 for i in range(3 + 4 * k)) for k in range(4)]


def write_classifier(directory: Path, family: str = "Llama", labels: int = 1) -> Any:
    """What TRL's RewardTrainer writes; returns the torch model."""
    return write_hf(directory, f"{family}ForSequenceClassification", num_labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_torch_whatever_the_batch_and_the_padding(
    family: str, tmp_path: Path, sft: Path, backbone: Backbone
) -> None:
    model = write_classifier(tmp_path / "hf", family)
    convert_rm(locate(str(tmp_path / "hf")), tmp_path / "rm", sft, Quantization(16), None)
    reward_model = load_reward_model(tmp_path / "rm", backbone)
    scores = reward_model.score_ids(PROMPT, ROWS)
    expected = [torch_score(model, [*PROMPT, *row]) for row in ROWS]
    assert max(expected) - min(expected) > 0.1
    assert scores == pytest.approx(expected, abs=1e-4)
    alone = [reward_model.score_ids(PROMPT, [row])[0] for row in ROWS]
    assert scores == pytest.approx(alone, abs=1e-5)
    padded = reward_model.score_ids(PROMPT, [*ROWS, ROWS[0] * 30])[: len(ROWS)]
    assert scores == pytest.approx(padded, abs=1e-5)
    split = [reward_model.score_ids(PROMPT[:4], [(*PROMPT[4:], *row)])[0] for row in ROWS]
    assert scores == pytest.approx(split, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_4_bits_correlation_and_agreement_are_measured(
    family: str, tmp_path: Path, sft: Path, backbone: Backbone, pair_file: Path
) -> None:
    model = write_classifier(tmp_path / "hf", family)
    source, out = locate(str(tmp_path / "hf")), tmp_path / "rm"
    row = convert_rm(source, out, sft, Quantization(4, 32), pair_file)
    assert row.cost.pearson is not None and row.cost.agreement is not None
    assert -1 <= row.cost.pearson <= 1 and 0 <= row.cost.agreement <= 1
    scores = load_reward_model(out, backbone).score_ids(PROMPT, ROWS)
    expected = [torch_score(model, [*PROMPT, *r]) for r in ROWS]
    assert scores != pytest.approx(expected, abs=1e-5)  # it was quantized
    assert scores == pytest.approx(expected, abs=1.0)


def test_a_text_is_scored_through_the_reward_models_own_template(
    tmp_path: Path, sft: Path, backbone: Backbone
) -> None:
    from mlx_grpo.core.types import Completion, Group, Prompt
    from tests.helpers.tiny import write_tokenizer

    model = write_classifier(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}")
    convert_rm(locate(str(tmp_path / "hf")), tmp_path / "rm", sft, Quantization(16), None)
    prompt = Prompt("p", ({"role": "user", "content": "why?"},), (1, 2, 3))
    texts = ("so.", "because", "")
    answers = tuple(Completion((9,), text, "stop", (0.0,)) for text in texts)
    scores = load_reward_model(tmp_path / "rm", backbone).score(Group(prompt, answers))
    encode = backbone.tokenizer.encode
    expected = [
        torch_score(model, encode(f"why?|{text}|", add_special_tokens=False)) for text in texts
    ]
    assert scores == pytest.approx(expected, abs=1e-4)


def test_a_trained_adapter_is_copied_and_scores_the_same(
    tmp_path: Path, sft: Path, backbone: Backbone, reward_model: Path
) -> None:
    row = convert_rm(locate(str(reward_model)), tmp_path / "rm", sft, Quantization(), None)
    before, after = (load_reward_model(d, backbone) for d in (reward_model, tmp_path / "rm"))
    scores = before.score_ids(PROMPT, ROWS)
    assert len(set(scores)) == len(ROWS)
    assert after.score_ids(PROMPT, ROWS) == scores
    arrays = load_arrays(reward_model / "adapters.safetensors")
    assert row.parameters == sum(a.size for a in arrays.values())


def test_a_trained_adapter_made_a_model_of_its_own_reads_the_same_tokens(
    tmp_path: Path, sft: Path, backbone: Backbone, reward_model: Path
) -> None:
    from mlx_grpo.core.types import Completion, Group, Prompt

    source = locate(str(reward_model))
    row = convert_rm(source, tmp_path / "rm", sft, Quantization(16), None, "full")
    assert row.form == "model"
    before, after = (load_reward_model(d, backbone) for d in (reward_model, tmp_path / "rm"))
    prompt = Prompt("p", ({"role": "user", "content": "why?"},), PROMPT)
    group = Group(prompt, tuple(Completion(r, "other text", "stop", (0.0,)) for r in ROWS))
    assert before.inputs(group) == after.inputs(group)
    assert after.score(group) == pytest.approx(before.score(group), abs=0.05)  # fused in bf16


def test_scores_that_do_not_vary_do_not_correlate_with_those_that_do() -> None:
    from mlx_grpo.core.stats import pearson

    assert pearson([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == 0.0
    assert pearson([1.0, 1.0], [2.0, 2.0]) == 1.0


def test_a_trained_adapter_is_refused_on_another_backbone(
    tmp_path: Path, reward_model: Path
) -> None:
    other = write_model(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match=r"reward_model\.json: made for a backbone with finger"):
        convert_rm(locate(str(reward_model)), tmp_path / "rm", other, Quantization(), None)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def spoil(directory: Path, how: str) -> None:
    """Change the weights of a classifier."""
    file = directory / "model.safetensors"
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
        return
    arrays = load_arrays(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    if how == "no head":
        del arrays["score.weight"]
    elif how == "a wide head":
        arrays["score.weight"] = mx.zeros((3, 32))
    elif how == "a narrow head":
        arrays["score.weight"] = mx.zeros((1, 16))
    elif how == "NaN in the head":
        arrays["score.weight"] = arrays["score.weight"] * float("nan")
    elif how == "NaN":
        arrays[name] = arrays[name] * float("nan")
    elif how == "a tensor missing":
        del arrays[name]
    save_arrays(file, arrays)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("cut short", r"model\.safetensors"),
        ("no head", r"tensor 'score\.weight' is missing; this model has no reward head"),
        ("a wide head", r"tensor 'score\.weight' has shape \[3, 32\]; .* has one label"),
        ("a narrow head", r"score\.weight.*16"),
        ("NaN in the head", r"score\.weight.*not finite"),
        ("NaN", r"tensor 'model\.layers\.0\.self_attn\.q_proj\.weight' holds values that are not"),
        ("a tensor missing", r"tensor 'model\.layers\.0\.self_attn\.q_proj\.weight' is missing"),
    ],
)
def test_a_classifier_is_refused_without_a_trace_when(
    how: str, complaint: str, tmp_path: Path, sft: Path
) -> None:
    write_classifier(tmp_path / "hf")
    spoil(tmp_path / "hf", how)
    with pytest.raises(InputError, match=rf"^{tmp_path}/hf.*{complaint}"):
        convert_rm(locate(str(tmp_path / "hf")), tmp_path / "rm", sft, Quantization(4, 32), None)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_two_labels_are_refused(tmp_path: Path, sft: Path) -> None:
    write_classifier(tmp_path / "hf", labels=2)
    with pytest.raises(
        InputError, match=r"hf/model\.safetensors: tensor 'score\.weight' has shape \[2"
    ):
        convert_rm(locate(str(tmp_path / "hf")), tmp_path / "rm", sft, Quantization(), None)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_reward_model_is_refused_as_sft_model_and_the_other_way_round(
    tmp_path: Path, sft: Path
) -> None:
    write_classifier(tmp_path / "hf")
    with pytest.raises(InputError, match=r"hf: this is a reward model; give it as --rm"):
        convert.convert_sft(locate(str(tmp_path / "hf")), tmp_path / "o", Quantization(), None)
    with pytest.raises(InputError, match=r"sft: not a reward model"):
        convert_rm(locate(str(sft)), tmp_path / "o", sft, Quantization(), None)


def test_its_own_full_output_can_be_loaded_as_a_backbone(tmp_path: Path, sft: Path) -> None:
    write_classifier(tmp_path / "hf")
    convert_rm(locate(str(tmp_path / "hf")), tmp_path / "rm", sft, Quantization(4, 32), None)
    assert load_backbone(tmp_path / "rm").tokenizer.has_chat_template
    about = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    assert (about["kind"], about["input"]) == ("full", "chat_template")
    assert about["pooling"] == "last_token_that_is_not_padding"
