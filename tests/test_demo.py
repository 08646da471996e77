"""The demo, whole, on a tiny model in the place of SmolLM2."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_grpo import demo
from mlx_grpo.config.settings import RewardTrainConfig, TrainConfig, with_settings
from mlx_grpo.console.output import Console
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.reward_modeling.train import train_rm
from mlx_grpo.run.directory import open_new
from tests.helpers.gguf_writer import write_tiny
from tests.helpers.tiny import write_jsonl

Demo = Callable[[], bool]


@pytest.fixture
def run(
    tmp_path: Path, prompt_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Demo, Path]:
    """(the demo, its working directory) with a tiny model, reward adapter and prompts."""
    gguf, first, rm = tmp_path / "tiny.gguf", tmp_path / "first", tmp_path / "rm"
    write_tiny(gguf, "mixed")
    convert_sft(locate(str(gguf)), first, Quantization(), None)
    pairs = [{"prompt": f"say {i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(8)]
    train_rm(
        RewardTrainConfig(
            model=str(first),
            pairs=str(write_jsonl(tmp_path / "pairs.jsonl", pairs)),
            output=str(rm),
            lora_rank=2,
        )
    )
    assets = {
        "weights/smollm2-rm": rm,
        "data/rl_prompts.jsonl": prompt_files[0],
        "data/eval_prompts.jsonl": prompt_files[1],
    }
    monkeypatch.setattr(demo, "asset", assets.__getitem__)
    monkeypatch.setattr(demo, "smollm2_gguf", lambda: gguf)
    small = with_settings(demo.DEMO, K=2, batch_size=2, max_completion_length=4, lora_rank=2)
    monkeypatch.setattr(demo, "DEMO", small)
    work = tmp_path / "work"
    return lambda: demo.demo(work, 1, 42, Console()), work


def test_it_converts_trains_and_compares_and_does_nothing_twice(
    run: tuple[Demo, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    go, work = run
    go()
    assert "3/3  compare" in capsys.readouterr().out
    made = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
    assert work / "runs" / "demo" / "final" / "adapters.safetensors" in made
    go()
    assert "holds a finished run" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()} == made


def test_a_stop_during_the_training_is_told_apart_from_its_end(
    run: tuple[Demo, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, _ = run
    monkeypatch.setattr(demo, "train", lambda *_, **__: False)
    assert not go()


def test_a_run_of_another_length_is_not_gone_on_with(
    run: tuple[Demo, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(config: TrainConfig, *_: object, **__: object) -> bool:
        open_new(config.run_directory, config)
        return False

    go, work = run
    monkeypatch.setattr(demo, "train", begin)
    assert not go()
    assert not go()  # the same again may go on
    with pytest.raises(
        InputError, match="begun with --iterations 1 --seed 42; use the same values"
    ):
        demo.demo(work, 2, 42, Console(quiet=True))


def test_other_weights_in_its_place_are_refused(run: tuple[Demo, Path], tmp_path: Path) -> None:
    go, work = run
    write_tiny(tmp_path / "other.gguf", "Q8_0")
    other = locate(str(tmp_path / "other.gguf"))
    convert_sft(other, work / "weights" / "sft-4bit", Quantization(), None)
    with pytest.raises(InputError, match="sft-4bit: not the demo's model; give an empty"):
        go()
