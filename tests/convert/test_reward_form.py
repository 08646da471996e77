"""What a converted reward model is: an adapter that shares the SFT model or a model of its own, and
what it reads: the scores of transformers for a whole padded batch, through a chat template.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.helpers.tiny import CHAT_TEMPLATE, EOS, PAD, write_jsonl, write_tokenizer

pytest.importorskip("torch")
import torch

from mlx_grpo.cli import main
from mlx_grpo.convert.convert import convert_rm, convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.reward_model import RewardModel, load_reward_model
from tests.helpers import sources
from tests.helpers.hf_models import TOKENS, torch_score

EXACT, PACKED = Quantization(16), Quantization(4, 32)
TEXTS = ("because the sky is", "so.", "it was the owls, I think, or the rain", "")
ASK = ({"role": "user", "content": "why is it so?"},)
RAISING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def group(texts: tuple[str, ...] = TEXTS, messages: Any = ASK) -> Group:
    """A group with these completions."""
    answers = tuple(Completion((9,), text, "stop", (0.0,)) for text in texts)
    return Group(Prompt("p", messages, (1, 2, 3)), answers)


def same_backbone(directory: Path, pad: int = PAD) -> Any:
    """`sft` and `rm` in a directory, the classifier built on the language model; returns it."""
    causal = sources.causal(directory / "sft", "llama", tie_word_embeddings=False)
    model = sources.classifier(directory / "rm", "llama", pad_token_id=pad)
    model.model.load_state_dict(causal.model.state_dict())
    sources.save_hf(model, directory / "rm")
    return model


def convert_both(
    directory: Path, target: Quantization, form: Any = "auto"
) -> tuple[str, RewardModel]:
    """Convert both; returns the reward model's form and the loaded model."""
    convert_sft(locate(str(directory / "sft")), directory / "out-sft", target, None)
    out = directory / f"out-{form}"
    row = convert_rm(locate(str(directory / "rm")), out, directory / "out-sft", target, None, form)
    return row.form, load_reward_model(out, load_backbone(directory / "out-sft"))


@pytest.mark.parametrize("target", [EXACT, PACKED, Quantization(8, 32)])
def test_a_classifier_on_the_sft_model_itself_becomes_an_adapter_of_zeros(
    target: Quantization, tmp_path: Path
) -> None:
    model = same_backbone(tmp_path)
    form, shared = convert_both(tmp_path, target)
    assert form == "adapter"
    arrays = load_arrays(tmp_path / "out-auto" / "adapters.safetensors")
    assert arrays and not any(v.any().item() for v in arrays.values())
    assert not (tmp_path / "out-auto" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "out-sft")
    form, full = convert_both(tmp_path, target, "full")
    assert form == "model"
    scores = [m.score_ids(tuple(TOKENS[:9]), [tuple(TOKENS[9:])]) for m in (shared, full)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # the same quantized values
    if target is EXACT:
        assert scores[0] == pytest.approx([torch_score(model, TOKENS)], abs=1e-4)


def test_another_backbone_is_kept_whole_and_adapter_refused_with_the_tensor(tmp_path: Path) -> None:
    model = same_backbone(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] += 0.25
    sources.save_hf(model, tmp_path / "rm")
    form, reward_model = convert_both(tmp_path, EXACT)
    assert form == "model"
    score = reward_model.score_ids(tuple(TOKENS[:9]), [tuple(TOKENS[9:])])
    assert score == pytest.approx([torch_score(model, TOKENS)], abs=1e-4)
    source, out = locate(str(tmp_path / "rm")), tmp_path / "refused"
    complaint = r"rm: layer 'model\.layers\.1\.mlp\.up_proj' differs .*; use --rm-as full"
    with pytest.raises(InputError, match=complaint):
        convert_rm(source, out, tmp_path / "out-sft", EXACT, None, "adapter")
    with pytest.raises(InputError, match=r"nowhere: no SFT model here; convert it first, or use"):
        convert_rm(source, out, tmp_path / "nowhere", EXACT, None, "adapter")
    assert not out.exists()


def test_an_adapter_for_another_base_than_the_sft_model_is_fused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = same_backbone(tmp_path)
    shutil.move(tmp_path / "rm", tmp_path / "base")
    other = sources.causal(tmp_path / "sft", "llama", seed=7, tie_word_embeddings=False)
    adapted = sources.peft_adapter(
        tmp_path / "rm", tmp_path / "base", model, task_type="SEQ_CLS", target_modules=["q_proj"]
    )
    expected = torch_score(sources.merged(adapted), TOKENS)
    form, reward_model = convert_both(tmp_path, EXACT)
    assert form == "model" and other is not None
    score = reward_model.score_ids(tuple(TOKENS[:9]), [tuple(TOKENS[9:])])
    assert score == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_scores_are_those_of_a_whole_padded_batch(form: str, pad: int, tmp_path: Path) -> None:
    model = same_backbone(tmp_path, pad)
    _, reward_model = convert_both(tmp_path, EXACT, form)
    scores = reward_model.score(group())
    encode = load_backbone(tmp_path / "out-sft").tokenizer.encode
    texts = [f"<user>{ASK[0]['content']}</s><assistant>{text}</s>" for text in TEXTS]
    rows = [encode(text, add_special_tokens=False) for text in texts]
    assert all(row[-1] == EOS for row in rows)
    width = max(map(len, rows)) + 3
    for side in ("left", "right"):
        padded, mask = [], []
        for row in rows:
            fill, seen = [pad] * (width - len(row)), [1] * len(row)
            padded.append(fill + row if side == "left" else row + fill)
            unseen = [0] * len(fill)
            mask.append(unseen + seen if side == "left" else seen + unseen)
        with torch.no_grad():
            expected = model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits[:, 0]
        assert max(expected) - min(expected) > 0.1
        assert scores == pytest.approx(expected.tolist(), abs=1e-4), side


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_scores_depend_neither_on_the_batch_nor_on_padding(
    form: str, pad: int, tmp_path: Path
) -> None:
    same_backbone(tmp_path, pad)
    _, reward_model = convert_both(tmp_path, EXACT, form)
    assert reward_model.tokenizer is not None  # input: chat_template
    scores = reward_model.score(group())
    assert max(scores) - min(scores) > 0.1
    alone = [reward_model.score(group((text,)))[0] for text in TEXTS]
    assert scores == pytest.approx(alone, abs=1e-5)
    backwards = reward_model.score(group(TEXTS[::-1]))[::-1]
    assert scores == pytest.approx(backwards, abs=1e-5)
    beside_a_long_one = reward_model.score(group((*TEXTS, "and so on " * 20)))[: len(TEXTS)]
    assert scores == pytest.approx(beside_a_long_one, abs=1e-5)
    twice = reward_model.score(group(TEXTS + TEXTS))
    assert twice == pytest.approx(scores + scores, abs=1e-5)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_system_message_goes_through_the_template(form: str, tmp_path: Path) -> None:
    model = same_backbone(tmp_path)
    _, reward_model = convert_both(tmp_path, EXACT, form)
    encode = load_backbone(tmp_path / "out-sft").tokenizer.encode
    messages = ({"role": "system", "content": "be brief"}, *ASK)
    text = f"<system>be brief</s><user>{ASK[0]['content']}</s><assistant>{TEXTS[0]}</s>"
    expected = torch_score(model, encode(text, add_special_tokens=False))
    assert reward_model.score(group((TEXTS[0],), messages)) == pytest.approx([expected], abs=1e-4)
    assert abs(reward_model.score(group((TEXTS[0],)))[0] - expected) > 1e-2


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_template_that_refuses_a_system_message_is_named_in_one_line(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same_backbone(tmp_path)
    write_tokenizer(tmp_path / "rm", RAISING + CHAT_TEMPLATE)
    _, reward_model = convert_both(tmp_path, EXACT, form)
    messages = ({"role": "system", "content": "be brief"}, *ASK)
    assert len(reward_model.score(group())) == len(TEXTS)
    with pytest.raises(InputError, match=r"refuses a conversation of system, user, assistant: no "):
        reward_model.score(group(messages=messages))
    row = {"messages": messages, "chosen": "yes", "rejected": "no"}
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [row, row])
    arguments = [
        "--rm",
        str(tmp_path / "rm"),
        "--output",
        str(tmp_path / "w"),
        "--pairs",
        str(pairs),
    ]
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "convert", "--group-size", "32", *arguments])
    capsys.readouterr()
    assert main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "pairs.jsonl:1" in err and "no system" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "w").exists()


def test_the_padding_token_is_written_down(tmp_path: Path, backbone: Backbone, sft: Path) -> None:
    same_backbone(tmp_path, EOS)
    convert_both(tmp_path, EXACT)
    about = json.loads((tmp_path / "out-auto" / "reward_model.json").read_text())
    assert (about["padding_token_id"], about["input"]) == (EOS, "chat_template")
    sources.mlx_directory(tmp_path / "mlx", tmp_path / "sft")
    save_arrays(tmp_path / "mlx" / "reward_head.safetensors", {"weight": mx.ones((1, 32))})
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    del config["pad_token_id"]
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    convert_rm(locate(str(tmp_path / "mlx")), tmp_path / "out", sft, EXACT, None)
    about = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert "padding_token_id" not in about and about["pooling"] == "last_token"
