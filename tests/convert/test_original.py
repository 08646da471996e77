"""The source in PyTorch beside the source in MLX: what is reported, refused, and not compared."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from mlx_grpo.convert import original, reader
from mlx_grpo.convert.convert import Checks, convert_rm, convert_sft
from mlx_grpo.convert.original import Agreement, compare_policy, compare_scores
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.reader import OpenedSource, open_source
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import load_chat_tokenizer
from mlx_grpo.models.reward_model import TextForm
from tests.helpers import sources
from tests.helpers.hf_models import write_hf
from tests.helpers.tiny import EOS, PAD
from tests.helpers.variants import VARIANTS, write_variant

BOTH, ANYWAY = Checks(against_source=True), Checks(against_source=True, allow_mismatch=True)
EXACT, PACKED = Quantization(16), Quantization(4, 32)
ROWS = [((257, 5, 9, 40), (7, 80, 200)), ((257, 33), (1, 2, 3, 4))]
Opened = Callable[[Path], OpenedSource]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """Opens a directory."""
    return lambda directory: open_source(locate(str(directory)), None, tmp_path)


def test_what_the_source_computes_is_reported_apart_from_what_quantization_cost(
    tmp_path: Path, prompt_files: tuple[Path, Path]
) -> None:
    write_hf(tmp_path / "hf", "Qwen2ForCausalLM")
    row = convert_sft(
        locate(str(tmp_path / "hf")), tmp_path / "out", PACKED, prompt_files[1], checks=BOTH
    )
    assert row.agreement.kl is not None and row.agreement.kl < 1e-6
    assert row.agreement.same_token == 1.0 and row.agreement.texts == 3
    assert row.cost.kl_per_token is not None and row.cost.kl_per_token > 1e-4
    assert "| the source in PyTorch | KL" in (row.path / "README.md").read_text()


def test_another_model_is_refused_and_nothing_is_written_unless_it_is_allowed(
    tmp_path: Path, prompt_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_variant(tmp_path / "hf", VARIANTS["phi3 longrope, long"])
    source, out = locate(str(tmp_path / "hf")), tmp_path / "out"
    monkeypatch.setattr(reader, "translated", lambda config: config)  # mlx-lm left to itself
    with pytest.raises(InputError, match=r"mlx-lm computes another model than transformers \S+, b"):
        convert_sft(source, out, EXACT, prompt_files[1], checks=BOTH)
    assert not out.exists()
    row = convert_sft(source, out, EXACT, prompt_files[1], checks=ANYWAY)
    assert row.agreement.kl is not None and row.agreement.kl > original.LIMIT


def test_weights_that_stay_as_they_are_stored_give_the_same_numbers(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "hf", "LlamaForCausalLM", tie_word_embeddings=True)
    monkeypatch.setattr(original, "_dtype", lambda opened: "stored")
    agreement = compare_policy(opened(tmp_path / "hf"), ROWS)
    assert agreement.kl is not None and agreement.kl < 1e-6


def test_an_adapter_is_compared_with_its_own_layers(tmp_path: Path, opened: Opened) -> None:
    model = sources.causal(tmp_path / "base", "llama")
    sources.peft_adapter(tmp_path / "peft", tmp_path / "base", model, task_type="CAUSAL_LM")
    agreement = compare_policy(opened(tmp_path / "peft"), ROWS)
    assert agreement.kl is not None and agreement.kl < 1e-6


def test_the_scores_of_a_classifier_are_compared_with_the_token_it_reads(
    tmp_path: Path, pair_file: Path, opened: Opened
) -> None:
    sources.classifier(tmp_path / "rm", "llama", pad_token_id=EOS)
    source = opened(tmp_path / "rm")
    tokenizer = load_chat_tokenizer(tmp_path / "rm")
    right, wrong = (
        compare_scores(source, tokenizer, TextForm(padding, template={}), pair_file)
        for padding in (EOS, PAD)
    )
    assert right.score_gap is not None and right.score_gap < 1e-4
    assert wrong.differs()


def test_a_peft_classifier_and_a_head_of_another_trainer_are_compared(
    tmp_path: Path, pair_file: Path
) -> None:
    causal = sources.causal(tmp_path / "base", "llama")
    model = sources.classifier(tmp_path / "whole", "llama")
    model.model.load_state_dict(causal.model.state_dict())
    sources.peft_adapter(tmp_path / "peft", tmp_path / "base", model, task_type="SEQ_CLS")
    sources.reward_head(tmp_path / "base", 32, True, "v_head.summary.")
    (tmp_path / "base" / "reward_head.safetensors").rename(
        tmp_path / "base" / "value_head.safetensors"
    )
    (tmp_path / "head").symlink_to(tmp_path / "base")
    for name in ("peft", "head"):
        out, none = tmp_path / f"{name}-out", tmp_path / "none"
        source = locate(str(tmp_path / name))
        row = convert_rm(source, out, none, EXACT, pair_file, checks=BOTH)
        assert row.agreement.compared, row.agreement
        assert not row.agreement.differs()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mlx", "the source is an MLX model"),
        ("packed", "quantized already"),
        ("hf", "torch is not installed (pip install 'mlx-grpo[verify]')"),
        ("large", "does not fit into this machine's memory"),
    ],
)
def test_what_cannot_be_compared_says_why(
    kind: str, reason: str, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources.causal(tmp_path / "hf", "llama")
    if kind in ("mlx", "packed"):
        sources.mlx_directory(tmp_path / kind, tmp_path / "hf", 4 if kind == "packed" else None)
    if kind == "hf":
        monkeypatch.setattr(original, "find_spec", lambda name: None)
    if kind == "large":
        monkeypatch.setattr(original, "physical_memory", lambda: 1)
    directory = tmp_path / ("hf" if kind == "large" else kind)
    agreement = compare_policy(opened(directory), ROWS)
    assert reason in agreement.describe() and not agreement.compared and not agreement.differs()


def test_a_source_that_transformers_cannot_run_is_not_compared_and_its_code_is_not_run(
    tmp_path: Path, opened: Opened
) -> None:
    sources.causal(tmp_path / "hf", "llama")
    source, marker = opened(tmp_path / "hf"), tmp_path / "ran"
    (tmp_path / "hf" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto = '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}'
    (tmp_path / "hf" / "config.json").write_text(auto)
    agreement = compare_policy(source, ROWS)
    assert "transformers cannot run it here" in agreement.describe() and not agreement.compared
    assert not marker.exists()


def test_a_comparison_that_gives_no_number_is_a_difference() -> None:
    for found in (Agreement(kl=math.nan), Agreement(score_gap=math.nan), Agreement(kl=1.0)):
        assert found.differs()
    assert not Agreement(kl=0.0).differs() and not Agreement().differs()
