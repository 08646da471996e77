"""Code beside a model never runs, and nobody is asked whether it may: in every place that loads."""

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.cli import main
from mlx_grpo.config.settings import with_settings
from mlx_grpo.config.sources import to_toml
from mlx_grpo.files.manifest import MANIFEST
from tests.helpers import sources

Trap = Callable[[Path], None]


def plant(directory: Path, owned: Path, tokenizer_class: str | None) -> None:
    """All the ways in which a model directory asks for its own code."""
    (directory / "evil.py").write_text(
        f"open({str(owned)!r}, 'w')\nclass Evil: pass\nModel = ModelArgs = Evil\n"
    )
    (directory / MANIFEST).unlink(missing_ok=True)
    named = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoModelForSequenceClassification": "evil.Evil",
    }
    for name in ("tokenizer_config.json", "config.json"):
        if (directory / name).is_file():
            config = json.loads((directory / name).read_text())
            config["auto_map"] = named
            if name == "tokenizer_config.json" and tokenizer_class:
                config["tokenizer_class"] = tokenizer_class
            (directory / name).write_text(json.dumps(config))


@pytest.mark.parametrize("tokenizer_class", [None, "Evil"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "sft",
            ("convert", "--no-verify", "--group-size", "32", "--output", "{out}", "--sft", "{sft}"),
        ),
        (
            "rm",
            ("convert", "--no-verify", "--group-size", "32", "--output", "{out}", "--rm", "{rm}"),
        ),
        (
            "base",
            (
                "convert",
                "--no-verify",
                "--group-size",
                "32",
                "--output",
                "{out}",
                "--sft",
                "{peft}",
            ),
        ),
        ("trained", ("train", "--config", "{config}", "--output", "{out}")),
        ("trained", ("train", "--dry-run", "--config", "{config}", "--output", "{out}")),
        ("trained", ("plan", "--config", "{config}")),
        ("trained", ("eval", "{run}")),
        ("trained", ("export", "{run}", "--output", "{out}", "--fuse")),
        (
            "trained",
            ("train-rm", "--model", "{trained}", "--pairs", "{pairs}", "--output", "{out}"),
        ),
        ("trained", ("doctor", "--weights", "{weights}")),
    ],
)
def test_code_beside_a_model_never_runs_and_nobody_is_asked(
    whole_sources: Path,
    finished_run: Path,
    pair_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: tuple[str, ...],
    tokenizer_class: str | None,
) -> None:
    from mlx_grpo.run.directory import run_settings

    owned, weights = tmp_path / "owned", tmp_path / "weights"
    config = run_settings(finished_run)
    trained = Path(shutil.copytree(config.model.actor, weights / "sft-4bit"))
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    changed = with_settings(config, actor_model=str(trained), output="")
    (run / "config.toml").write_text(to_toml(changed))
    places = {"trained": trained, "weights": weights, "run": run, "pairs": pair_file}
    for kind in ("sft", "rm", "base"):
        places[kind] = Path(shutil.copytree(whole_sources / kind, tmp_path / kind))
    causal = sources.causal(tmp_path / "again", "llama", tie_word_embeddings=False)
    sources.peft_adapter(tmp_path / "peft", places["base"], causal, task_type="CAUSAL_LM")
    places |= {"peft": tmp_path / "peft", "config": run / "config.toml", "out": tmp_path / "out"}
    plant(places[name], owned, tokenizer_class)

    def asked(*_: Any) -> str:
        pytest.fail("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", *(w.format(**places) for w in words)])
    code = main()
    told = capsys.readouterr().err
    assert code in (0, 1, 2) and "Traceback" not in told
    assert not owned.exists()
    if code == 2:
        assert told.splitlines()[-1].startswith("error: /")
