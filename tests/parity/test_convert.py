"""The parity table: each family and kind of source, written by transformers, peft or mlx-lm, scored
by PyTorch and here. `pytest -s` prints the largest differences at 16 bits and the costs at 4.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch

from mlx_grpo.convert.convert import Converted, convert_rm, convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.data.tables import read_rows
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.reward_model import load_reward_model
from tests.helpers import sources
from tests.helpers.hf_models import (
    TOKENS,
    found_logps,
    load_dequantized,
    torch_logps,
    torch_score,
    widest,
)
from tests.helpers.sources import FAMILIES

BOUND = 1e-4
EXACT, PACKED = Quantization(16), Quantization(4, 32)
Note = Callable[[str, str, float | str], None]
Written = Callable[[str, str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def note() -> Iterator[Note]:
    """Collects (family, kind of source, result) and prints them in the end."""
    rows: list[tuple[str, str, str]] = []

    def add(family: str, kind: str, result: float | str) -> None:
        rows.append((family, kind, result if isinstance(result, str) else f"{result:.1e}"))

    yield add
    print("\n" + "\n".join(f"{f:<12} {k:<58} {r}" for f, k, r in sorted(rows)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(directory, torch model) of a language model or classifier, written once."""
    made: dict[tuple[str, str], tuple[Path, Any]] = {}
    root = tmp_path_factory.mktemp("hf")

    def get(family: str, role: str) -> tuple[Path, Any]:
        if (family, role) not in made:
            directory = root / f"{family}-{role}"
            writer = sources.causal if role == "sft" else sources.classifier
            made[family, role] = directory, writer(directory, family)
        directory, model = made[family, role]
        return directory, copy.deepcopy(model)

    return get


def scores_of(directory: Path, sft: Path | None = None) -> list[float]:
    """Scores of three sequences under a converted reward model."""
    model = load_reward_model(directory, load_backbone(sft or directory))
    return [model.score_ids(tuple(TOKENS[:n]), [tuple(TOKENS[n:])])[0] for n in (1, 7, 20)]


def check_logps(source: Path, out: Path, model: Any) -> float:
    """Convert at 16 bits; the largest difference of a log-prob."""
    convert_sft(locate(str(source)), out, EXACT, None)
    expected = torch_logps(model, TOKENS)
    assert max(expected) - min(expected) > 1  # a model that has something to lose
    difference = widest(found_logps(out), expected)
    assert difference <= BOUND
    return difference


def check_score(source: Path, out: Path, score: Callable[[list[int]], float]) -> float:
    """Convert at 16 bits as a model of its own; the largest difference of a score."""
    row = convert_rm(locate(str(source)), out, out.parent / "none", EXACT, None)
    assert row.form == "model"
    expected = score(TOKENS)
    assert abs(expected - score(TOKENS[:-1])) > 1e-2
    difference = widest(scores_of(out), [expected] * 3)  # wherever prompt and answer meet
    assert difference <= BOUND
    return difference


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_of_every_family(
    family: str, written: Written, tmp_path: Path, note: Note
) -> None:
    source, model = written(family, "sft")
    note(family, "sft: safetensors", check_logps(source, tmp_path / "out", model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_adapter_of_every_family(
    family: str, written: Written, tmp_path: Path, note: Note
) -> None:
    base, model = written(family, "sft")
    adapted = sources.peft_adapter(tmp_path / "peft", base, model, task_type="CAUSAL_LM")
    difference = check_logps(tmp_path / "peft", tmp_path / "out", sources.merged(adapted))
    note(family, "sft: PEFT LoRA", difference)
    without = torch_logps(written(family, "sft")[1], TOKENS)
    assert widest(found_logps(tmp_path / "out"), without) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_every_family(
    family: str, written: Written, tmp_path: Path, note: Note
) -> None:
    source, model = written(family, "rm")
    difference = check_score(source, tmp_path / "out", lambda ids: torch_score(model, ids))
    note(family, "rm: classifier, safetensors", difference)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_classifier_of_every_family_in_both_forms(
    family: str, written: Written, tmp_path: Path, note: Note
) -> None:
    base, causal = written(family, "sft")
    _, model = written(family, "rm")
    model.model.load_state_dict(causal.model.state_dict())
    adapted = sources.peft_adapter(tmp_path / "peft", base, model, task_type="SEQ_CLS")
    expected = torch_score(adapted, TOKENS)
    source, sft = locate(str(tmp_path / "peft")), tmp_path / "sft"
    convert_sft(locate(str(base)), sft, EXACT, None)
    row = convert_rm(source, tmp_path / "rm", sft, EXACT, None)
    assert row.form == "adapter"
    difference = widest(scores_of(tmp_path / "rm", sft), [expected] * 3)
    note(family, "rm: PEFT SEQ_CLS, as adapter", difference)
    assert difference <= BOUND
    fused = sources.merged(adapted)
    difference = check_score(tmp_path / "peft", tmp_path / "full", lambda i: torch_score(fused, i))
    note(family, "rm: PEFT SEQ_CLS, fused", difference)


@pytest.mark.parametrize("kind", ["sharded", ".bin", ".bin, sharded"])
@pytest.mark.parametrize("role", ["sft", "rm"])
def test_other_files_of_transformers(role: str, kind: str, tmp_path: Path, note: Note) -> None:
    writer = sources.causal if role == "sft" else sources.classifier
    model = writer(tmp_path / "hf", "llama")
    if kind == "sharded":
        sources.reshard(model, tmp_path / "hf")
    else:
        sources.pickle(tmp_path / "hf", 3 if "sharded" in kind else 1)
    if role == "sft":
        difference = check_logps(tmp_path / "hf", tmp_path / "out", model)
    else:
        difference = check_score(
            tmp_path / "hf", tmp_path / "out", lambda ids: torch_score(model, ids)
        )
    note("llama", f"{role}: {kind}", difference)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_tied_and_not(tied: bool, tmp_path: Path, note: Note) -> None:
    model = sources.causal(tmp_path / "hf", "llama", tie_word_embeddings=tied)
    sources.mlx_directory(tmp_path / "mlx", tmp_path / "hf")
    for name in ("hf", "mlx"):
        difference = check_logps(tmp_path / name, tmp_path / f"{name}-out", model)
        note("llama", f"sft: {name}, {'tied' if tied else 'untied'}", difference)


def test_a_quantized_mlx_directory_has_the_values_mlx_lm_gave_it(
    written: Written, tmp_path: Path, note: Note
) -> None:
    source, model = written("llama", "sft")
    sources.mlx_directory(tmp_path / "mlx", source, bits=4)
    load_dequantized(model, tmp_path / "mlx")
    note("llama", "sft: mlx-lm, 4 bits", check_logps(tmp_path / "mlx", tmp_path / "out", model))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_mlx_lora(family: str, written: Written, tmp_path: Path, note: Note) -> None:
    source, model = written(family, "sft")
    sources.mlx_adapter(tmp_path / "lora", source)
    sources.add_mlx_adapter(model, tmp_path / "lora")
    note(family, "sft: mlx-lm LoRA", check_logps(tmp_path / "lora", tmp_path / "out", model))


def head_score(model: Any, head: dict[str, torch.Tensor]) -> Callable[[list[int]], float]:
    """The head's formula, written out."""

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            last = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(head["weight"][0] @ last + head.get("bias", torch.zeros(1))[0])

    return score


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "reward_head."])
def test_an_mlx_backbone_or_lora_with_a_reward_head(
    bias: bool, prefix: str, written: Written, tmp_path: Path, note: Note
) -> None:
    source, model = written("llama", "sft")
    sources.mlx_directory(tmp_path / "mlx", source)
    head = sources.reward_head(tmp_path / "mlx", 32, bias, prefix)
    difference = check_score(tmp_path / "mlx", tmp_path / "out", head_score(model, head))
    end = f"{prefix}weight, {prefix}bias" if bias else f"{prefix}weight"
    note("llama", f"rm: mlx-lm + {end}", difference)
    sources.mlx_adapter(tmp_path / "lora", source)
    head = sources.reward_head(tmp_path / "lora", 32, bias, prefix)
    sources.add_mlx_adapter(model, tmp_path / "lora")
    difference = check_score(tmp_path / "lora", tmp_path / "fused", head_score(model, head))
    note("llama", f"rm: mlx-lm LoRA + {end}", difference)


def torch_cost(before: Any, after: Any, encode: Any, texts: Path) -> tuple[float, float]:
    """(KL per token, relative change of the perplexity) in float64, from the definition."""
    kl, nll = [], [[], []]
    for _, row in read_rows(texts):
        prompt = encode(f"<user>{row['prompt']}</s><assistant>", add_special_tokens=False)
        ids = prompt + encode(f"{row['response']}</s>", add_special_tokens=False)
        with torch.no_grad():
            p, q = (
                torch.log_softmax(
                    m(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double(), -1
                )
                for m in (before, after)
            )
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        for side, logp in zip(nll, (p, q), strict=True):
            side += [-logp[t, token].item() for t, token in enumerate(ids[len(prompt) :])]
    return float(np.mean(kl)), float(np.exp(np.mean(nll[1]) - np.mean(nll[0])) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_of_4_bits_is_what_torch_finds(
    family: str, written: Written, tmp_path: Path, prompt_files: tuple[Path, Path], note: Note
) -> None:
    source, before = written(family, "sft")
    cost = convert_sft(locate(str(source)), tmp_path / "out", PACKED, prompt_files[1]).cost
    after = copy.deepcopy(before)
    load_dequantized(after, tmp_path / "out")
    encode = load_backbone(tmp_path / "out").tokenizer.encode
    kl, change = torch_cost(before, after, encode, prompt_files[1])
    assert cost.kl_per_token == pytest.approx(kl, rel=1e-3)
    found = cost.perplexity_after / cost.perplexity_before - 1
    assert found == pytest.approx(change, abs=1e-4)
    assert 1e-4 < kl < 0.3
    note(family, "sft: cost at 4 bits", cost.describe())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_agreement_at_4_bits_is_what_torch_finds(
    family: str, written: Written, tmp_path: Path, pair_file: Path, note: Note
) -> None:
    source, before = written(family, "rm")
    row: Converted = convert_rm(
        locate(str(source)), tmp_path / "rm", tmp_path / "none", PACKED, pair_file
    )
    after = copy.deepcopy(before)
    load_dequantized(after, tmp_path / "rm")
    encode = load_backbone(tmp_path / "rm").tokenizer.encode
    scores = []
    for model in (before, after):
        texts = [
            f"<user>{row['prompt']}</s><assistant>{row[side]}</s>"
            for _, row in read_rows(pair_file)
            for side in ("chosen", "rejected")
        ]
        ids = [encode(text, add_special_tokens=False) for text in texts]
        scores.append(np.array([torch_score(model, i) for i in ids]))
    ranks = [s.argsort().argsort() for s in scores]
    ahead = [s[::2] > s[1::2] for s in scores]
    assert row.cost.pearson == pytest.approx(np.corrcoef(*scores)[0, 1], abs=1e-4)
    assert row.cost.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-4)
    assert row.cost.agreement == (ahead[0] == ahead[1]).mean()
    assert row.cost.pearson > 0.5
    note(family, "rm: cost at 4 bits", row.cost.describe())
