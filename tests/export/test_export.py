"""A run's adapter in other forms: the numbers that mlx-lm, transformers and PEFT find in them."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load

from mlx_grpo.cli import main
from mlx_grpo.config.settings import with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.convert.source import declared_base, licence
from mlx_grpo.core.errors import InputError
from mlx_grpo.evaluation.chat import open_chat
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.export.card import Subject, export_card
from mlx_grpo.export.export import Export, export_run
from mlx_grpo.export.fused_cost import FusedCost
from mlx_grpo.files.manifest import verify_manifest, write_manifest
from mlx_grpo.files.safetensors import load_arrays
from mlx_grpo.run.directory import other_model, run_settings
from tests.helpers.tiny import write_jsonl

TOKENS = mx.array([[5, 90, 17, 200, 33, 64, 7, 128]])


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Path:
    """Its short name here."""
    return finished_run


def logits(model: Path, adapter: Path | None = None) -> mx.array:
    """As mlx-lm's own loader and model compute them, weights widened so that rounding is none."""
    loaded = load(str(model), adapter_path=str(adapter) if adapter else None)[0]
    loaded.set_dtype(mx.float32)
    return loaded(TOKENS)


def difference(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


def export(run: Path, form: Any, out: Path, **options: Any) -> Path:
    return export_run(Export(run, form, output=out, **options)).directory


def test_the_adapter_is_what_mlx_lm_loads(run: Path, tmp_path: Path) -> None:
    out, sft = export(run, "adapter", tmp_path / "a"), run.parent / "sft-4bit"
    assert difference(logits(sft, out), logits(sft, run / "best")) == 0
    assert difference(logits(sft, out), logits(sft)) > 0.01
    verify_manifest(out)


def test_sixteen_bits_keep_the_adapters_work_and_four_bits_say_what_they_lost(
    run: Path, tmp_path: Path
) -> None:
    adapted = logits(run.parent / "sft-4bit", run / "best")
    wide = export_run(Export(run, "dequantized", output=tmp_path / "wide"))
    packed = export_run(Export(run, "fused", output=tmp_path / "packed"))
    near, far = (difference(logits(e.directory), adapted) for e in (wide, packed))
    assert near < 0.1 < far
    assert wide.cost and packed.cost and wide.cost.fused < packed.cost.fused / 10
    assert wide.cost.trained == packed.cost.trained > 1e-3
    assert wide.cost.advice() is None
    assert packed.cost.describe() in (tmp_path / "packed" / "README.md").read_text()


def test_an_adapter_is_not_put_on_another_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same shape: nothing but the checkpoint's digest knows."""
    here = shutil.copytree(run, tmp_path / "run")
    sft = shutil.copytree(run.parent / "sft-4bit", tmp_path / "sft-4bit")
    settings = (here / "config.toml").read_text()
    (here / "config.toml").write_text(settings.replace(str(run.parent / "sft-4bit"), str(sft)))
    assert other_model(here, sft) is None
    weights = load_arrays(sft / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith(".scales"))
    mx.save_safetensors(str(sft / "model.safetensors"), {**weights, name: weights[name] * 1.01})
    write_manifest(sft)
    line = re.escape(f"{sft}: not the model that {here} was trained on")
    with pytest.raises(InputError, match=line):
        export(here, "fused", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for told in (lambda ui: open_chat(here, "", ui), lambda ui: compare_run(here, None, "", ui, 1)):
        told(Console())
        assert re.search(line, re.sub(r"\s+", " ", capsys.readouterr().err))
    for state in (here / "checkpoints").glob("step-*/state.json"):
        state.write_text("{")
    assert other_model(here, sft) is None  # no checkpoint says


def test_rounding_that_undoes_training_is_told() -> None:
    assert "--dequantize" in (FusedCost(fused=0.1, trained=0.2, texts=24).advice() or "")
    assert FusedCost(fused=0.01, trained=0.2, texts=24).advice() is None


def test_a_fused_model_is_quantized_as_its_source_was(run: Path, tmp_path: Path) -> None:
    out = export(run, "fused", tmp_path / "fused", verify=False)
    before, after = (load_arrays(d / "model.safetensors") for d in (run.parent / "sft-4bit", out))
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {
        n: (v.shape, v.dtype) for n, v in after.items()
    }
    changed = {n for n in before if not mx.array_equal(before[n], after[n])}
    assert changed and all("_proj" in n for n in changed)


def test_the_card_holds_the_runs_figures_and_no_path_of_this_machine(
    run: Path, tmp_path: Path
) -> None:
    card = (export(run, "adapter", tmp_path / "a") / "README.md").read_text()
    assert (tmp_path / "a" / "report.html").read_text() == (run / "report.html").read_text()
    assert "[report.html](report.html)" in card
    assert re.search(r"\| reward \| -\d\.?\d* \| -\d", card)
    assert "| kl targets | 5.0 |" in card and "rewards.py:short" in card
    assert str(run.parent) not in card
    without = export(run, "adapter", tmp_path / "b", report=False)
    assert "report" not in (without / "README.md").read_text()
    assert not (without / "report.html").exists()


def test_the_card_shows_what_the_gold_judges_gave(run: Path, tmp_path: Path) -> None:
    config = with_settings(run_settings(run), eval_reward=("judges.py:plain",))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    key = "eval_rewards/plain/mean"
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [row | ({key: 0.5 + row["step"] / 8} if "eval_reward" in row else {}) for row in rows],
    )
    about = Subject(tmp_path, tmp_path / "final", run.parent, None, "adapter", "a", False)
    assert "| gold judge: plain | 0.5 | 0.75 |" in export_card(about, config, None)


def test_a_directory_beside_us_is_no_hub_id(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = export(run, "peft", tmp_path / "p", base="mine/base") / "README.md"
    assert "base_model" not in card.read_text()


def test_base_and_licence_come_from_the_card_of_the_sft_model(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "copy")
    copied = tmp_path / "copy" / "run"
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace(str(run.parent), str(tmp_path / "copy")))
    card = tmp_path / "copy" / "sft-4bit" / "README.md"
    card.write_text("---\nlicense: mit\nbase_model: owner/name\n---\n")
    out = export(copied, "adapter", tmp_path / "a")
    assert licence(out) == "mit"
    assert '"model": "owner/name"' in (out / "adapter_config.json").read_text()
    card.write_text("---\nbase_model: owner/name\nbase_model_relation: finetune\n---\n")
    assert declared_base(card.parent) is None  # its weights are not those of owner/name
    for base, shown in (("other/one", True), (str(tmp_path / "hf"), False)):
        out = export(copied, "peft", tmp_path / "b", base=base, replace=True)
        assert (base in (out / "README.md").read_text()) == shown


REFUSED = {
    "two forms": (("--fuse", "--peft"), "give one of them"),
    "bits of an adapter": (("--dequantize",), "--dequantize: needs --fuse"),
    "texts for an adapter": (("--texts", "t.jsonl"), "--texts: needs --fuse"),
    "a private nothing": (("--private",), "--private: needs --push"),
    "another adapter": (("--adapter", "last"), "must be best or final"),
    "no texts": (("--fuse", "--texts", "none.jsonl"), "none.jsonl: no such file; give --texts"),
    "an existing directory": (("--output", "."), "already exists; replace it with --force"),
    "no name of a repository": (("--push", "a/b/c"), "not a repository's name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    case: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, complaint = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "export", str(run), *flags])
    assert main() == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and complaint in err
    assert not (run / "export").exists() and not list(tmp_path.iterdir())


def test_the_command_writes_beside_the_run_and_replaces_only_when_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", "export", str(run), *flags])
        return main()

    try:
        assert [command("--fuse"), command("--fuse"), command("--fuse", "--force")] == [0, 2, 0]
        out, err = capsys.readouterr()
        assert "what fusing cost: KL" in out and "reference answers" in out
        assert f"mlx_lm.generate --model {run / 'export' / 'fused'}" in out
        assert "already exists" in err
    finally:
        shutil.rmtree(run / "export", ignore_errors=True)


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("work/run", "has no manifest.json"),
        ("work", "has no manifest.json"),
        ("work/run/best", "part of the run"),
        ("work/run/checkpoints/step-000002", "part of the run"),
        ("work/sft", "the SFT model of the run"),
        ("work/link", "the SFT model of the run"),
        ("work/prompts.jsonl", "a file"),
    ],
)
def test_force_replaces_an_earlier_export_and_nothing_else(
    place: str,
    complaint: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    shutil.copytree(run, work / "run")
    config = work / "run" / "config.toml"
    sft = run_settings(run).model.actor
    shutil.copytree(sft, work / "sft")
    (work / "link").symlink_to(work / "sft")
    (work / "prompts.jsonl").write_text("mine")
    config.write_text(config.read_text().replace(sft, str(work / "sft")))
    flags = ["--output", str(tmp_path / place), "--force", "--no-verify"]
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "export", str(work / "run"), *flags])
    before = sorted(p for p in work.rglob("*"))
    assert main() == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and complaint in err and "--force does not replace" in err
    assert sorted(p for p in work.rglob("*")) == before


def test_texts_without_answers_cannot_measure(run: Path, tmp_path: Path) -> None:
    from mlx_grpo.core.errors import InputError

    texts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "why?"}])
    with pytest.raises(InputError, match="two are needed"):
        export(run, "fused", tmp_path / "f", texts=texts)
