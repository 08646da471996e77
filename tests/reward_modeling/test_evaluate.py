"""Any reward model on any pairs: the figures are those of its training, by field, and in JSON."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.cli import main
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import read_json
from mlx_grpo.models.reward_model import REWARD_CONFIG, REWARD_HEAD
from mlx_grpo.reward_modeling.evaluate import MISSING, PairsWanted, evaluate_rm
from mlx_grpo.reward_modeling.train import train_rm
from tests.helpers.tiny import write_jsonl, write_model

Evaluate = Callable[..., tuple[int, str, str]]


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"say {i // 2}",
            "chosen": "yes " * (1 + i % 3),
            "rejected": f"no {i}",
            "split": "test" if i < 4 else "train",
            "category": ["chat", "code", None][i % 3],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows())


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of its own, which reads texts through its own chat template."""
    path = write_model(tmp_path_factory.mktemp("own") / "rm", seed=3)
    weight = mx.random.normal((1, 32), key=mx.random.key(1))
    mx.save_safetensors(str(path / REWARD_HEAD), {"weight": weight})
    (path / REWARD_CONFIG).write_text(json.dumps({"kind": "full", "input": "chat_template"}))
    return path


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", "eval-rm", *map(str, arguments)])
        capsys.readouterr()
        return main(), *capsys.readouterr()

    return run


def test_figures_of_an_adapter_are_those_of_its_training(
    sft: Path, pairs: Path, tmp_path: Path
) -> None:
    config = RewardTrainConfig(
        model=str(sft), pairs=str(pairs), output=str(tmp_path / "rm"), epochs=1, lora_rank=2
    )
    trained = train_rm(replace(config, learning_rate=1e-2))
    found = evaluate_rm(tmp_path / "rm", PairsWanted(pairs, split="test"), sft)
    assert found.quality.pairs == trained.pairs == 4
    assert found.quality.accuracy == trained.accuracy
    assert found.quality.longer_wins == trained.longer_wins
    assert found.quality.loss == pytest.approx(trained.loss, rel=0.01)  # stored in 16 bits
    assert found.stored_temperature == trained.temperature
    assert found.stored_error is not None


def test_pairs_as_messages_get_the_scores_of_the_same_texts(
    own_model: Path, pairs: Path, tmp_path: Path
) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    chats = [
        {s: [turn("user", r["prompt"]), turn("assistant", r[s])] for s in ("chosen", "rejected")}
        for r in rows()
    ]
    messages = write_jsonl(tmp_path / "chats.jsonl", chats)
    found = evaluate_rm(own_model, PairsWanted(messages))
    assert found.quality == evaluate_rm(own_model, PairsWanted(pairs)).quality
    assert (found.quality.pairs, found.stored_temperature, found.by) == (12, None, {})


def test_a_field_divides_the_pairs_and_their_figures(own_model: Path, pairs: Path) -> None:
    found = evaluate_rm(own_model, PairsWanted(pairs, by=("category",)))
    sides = found.by["category"]
    assert {v: r.pairs for v, r in sides.items()} == {"chat": 4, "code": 4, MISSING: 4}
    mean = sum(r.accuracy * r.pairs for r in sides.values()) / 12
    assert mean == pytest.approx(found.quality.accuracy)


def test_answers_of_one_prompt_are_scored_once(
    own_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_grpo.models.reward_model import RewardModel

    scored: list[list[str]] = []

    def score(self: RewardModel, group: Any) -> list[float]:
        scored.append([c.text for c in group.completions])
        return [float(len(c.text)) for c in group.completions]

    monkeypatch.setattr(RewardModel, "score", score)
    found = evaluate_rm(own_model, PairsWanted(pairs))
    assert len(scored) == 6  # prompts
    assert all(len(set(texts)) == len(texts) for texts in scored)
    assert found.quality.accuracy == 10 / 12  # by length in letters, equal ones count half


def test_what_is_skipped_is_counted(own_model: Path, tmp_path: Path) -> None:
    bad = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"prompt": "say 0", "chosen": "y" * 90, "rejected": "no"},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", [*rows(), *bad])
    found = evaluate_rm(own_model, PairsWanted(file, max_length=64))
    assert found.quality.pairs == 12
    assert found.skipped == {
        "with equal answers": 1, "with an empty answer": 1, "longer than 64 tokens": 1
    }  # fmt: skip
    assert evaluate_rm(own_model, PairsWanted(file, limit=3)).quality.pairs == 3


def test_the_command_shows_tables_and_writes_them(
    evaluate: Evaluate, own_model: Path, pairs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    code, out, err = evaluate(own_model, "--pairs", pairs, "--by", "category", "--json", file)
    assert code == 0, err
    for text in ("accuracy", "longer wins", "Calibration error", "temperature", "By category"):
        assert text in out
    figures = read_json(file)
    assert figures["pairs"] == 12
    assert set(figures["by"]["category"]) == {"chat", "code", MISSING}
    assert figures["reward_model"] == str(own_model)
    assert len(figures["interval"]) == 2


def test_a_file_with_other_names_is_read_by_them(
    evaluate: Evaluate, own_model: Path, tmp_path: Path
) -> None:
    renamed = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in rows()]
    file = write_jsonl(tmp_path / "p.jsonl", renamed)
    names = ("--prompt-column", "q", "--chosen-column", "good", "--rejected-column", "bad")
    assert evaluate(own_model, "--pairs", file, *names)[0] == 0
    code, _, err = evaluate(own_model, "--pairs", file)
    assert (code, err.count("\n")) == (2, 1)
    assert "field 'chosen' is missing; the row has q, good, bad" in err


def test_an_adapter_without_its_model_is_refused(
    evaluate: Evaluate, reward_model: Path, pairs: Path, tmp_path: Path
) -> None:
    code, _, err = evaluate(reward_model, "--pairs", pairs)
    assert (code, err.count("\n")) == (2, 1)
    assert "name the model it was made for: --actor-model" in err
    other = write_model(tmp_path / "other", seed=5)
    code, _, err = evaluate(reward_model, "--pairs", pairs, "--actor-model", other)
    assert code == 2 and "made for a backbone with fingerprint" in err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"by": ("subject",)}, "no row has the field 'subject' of --by; there are category"),
        ({"split": "valid"}, "no pairs of split 'valid' in it"),
        ({"max_length": 3}, r"no usable pairs \(12 longer than 3 tokens\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    changes: dict[str, Any], complaint: str, own_model: Path, pairs: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        evaluate_rm(own_model, replace(PairsWanted(pairs), **changes))


def test_a_directory_without_a_reward_model_is_refused(
    evaluate: Evaluate, sft: Path, pairs: Path, tmp_path: Path
) -> None:
    code, _, err = evaluate(sft, "--pairs", pairs)
    assert code == 2 and "no reward model here" in err
    shutil.copytree(sft, tmp_path / "d")
    code, _, err = evaluate(sft, "--pairs", pairs, "--json", tmp_path / "d")
    assert code == 2 and "--json" in err
