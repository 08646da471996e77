"""Exports of families whose weights have other names in transformers: said, or refused."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.cli import main
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.export.names import SAME_WEIGHTS
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.lora import add_lora
from tests.helpers.mixtures import mixture_config
from tests.helpers.runs import write_trained
from tests.helpers.terminal import ROOT
from tests.helpers.tiny import VOCABULARY, write_model_of

GPT2 = {
    **{"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCABULARY},
    **{"n_ctx": 256, "n_positions": 256, "layer_norm_epsilon": 1e-5},
}
Command = Callable[..., int]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Command:
    """`mlx-grpo export` with arguments; its exit code."""

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", "export", *map(str, arguments)])
        return main()

    return command


def run_of(root: Path, config: dict[str, Any]) -> Path:
    """A run with an adapter, on a tiny model."""
    source, sft = write_model_of(root / "source", config), root / "sft"
    convert_sft(locate(str(source)), sft, Quantization(4, 32), None)
    adapted = add_lora(load_backbone(sft).model, rank=2, scale=1.0, seed=0)
    return write_trained(root / "run", sft, adapted)


def test_sixteen_bits_say_where_transformers_would_find_no_weights(
    tmp_path: Path, export: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, mixture_config("qwen3_moe"))
    assert export(run, "--fuse", "--dequantize", "--no-verify") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: load this model with mlx-lm, not with transformers" in told
    card = (run / "export" / "dequantized" / "README.md").read_text()
    assert "Load this model with mlx-lm, not with transformers: weights of model type" in card
    assert export(run, "--fuse", "--no-verify") == 0
    assert "transformers" not in capsys.readouterr().err


def test_peft_is_refused_where_it_would_find_no_layers(
    tmp_path: Path, export: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, GPT2)
    assert export(run, "--peft", "--base", "somebody/model") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "PEFT looks layers up by transformers' names" in told and "use --fuse" in told
    assert not (run / "export").exists()


def test_the_manual_lists_the_families_that_transformers_loads() -> None:
    manual = (ROOT / "docs" / "commands" / "export.md").read_text()
    listed = re.search(r"same name and shape there: ([^.]*)\.", manual)
    assert listed and listed[1].split() == ", ".join(sorted(SAME_WEIGHTS)).split()
