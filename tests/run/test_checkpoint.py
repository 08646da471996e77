"""A checkpoint comes back bit for bit, damage is found and named, a crash leaves nothing half
done."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.types import Parameters
from mlx_grpo.files import atomic as files
from mlx_grpo.grpo.kl_controller import KLController
from mlx_grpo.grpo.state import Best, RunState
from mlx_grpo.rewards.normalizer import ScoreNormalizer
from mlx_grpo.run import checkpoint
from mlx_grpo.run.checkpoint import Checkpoint, load, load_newest, save, step_directories

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def example(iteration: int) -> Checkpoint:
    awkward = [-0.0, math.inf, 1e-45, 3.4e38, 1 / 3, math.nan]
    a = mx.random.normal((4, 3), key=key(iteration, "a"))
    adapter = {"layers.0.lora_a": a, "layers.0.lora_b": mx.array(awkward)[None]}
    optimizer = {
        "step": mx.array(iteration, mx.uint64),
        "layers.0.lora_a.m": a.astype(mx.bfloat16),
        "learning_rate": mx.array(1e-4),
    }
    state = {"iteration": iteration, "beta": 0.1 + 0.2, "best": {"step": None}, "text": "é\n"}
    return Checkpoint(iteration, adapter, optimizer, state)


def bits(arrays: Parameters) -> dict[str, tuple[Any, ...]]:
    return {n: (str(v.dtype), v.shape, bytes(np.array(v.view(mx.uint8)))) for n, v in flat(arrays)}


def flat(arrays: Parameters) -> list[tuple[str, mx.array]]:
    return [(n, v.reshape(-1) if v.ndim == 0 else v) for n, v in sorted(arrays.items())]


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert (found.iteration, found.state) == (expected.iteration, expected.state)
    assert bits(found.adapter) == bits(expected.adapter)
    assert bits(found.optimizer) == bits(expected.optimizer)


def flip(file: Path, position: int | None = None, mask: int = 0xFF) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if position is None else position] ^= mask
    file.write_bytes(content)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, example(7), keep=3)
    assert path == tmp_path / "step-000007"
    assert names(path) == sorted(FILES)
    assert_same(load(path), example(7))
    assert (tmp_path / "latest").read_text() == "step-000007\n"


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, Checkpoint(7, {"x": mx.zeros(2)}, {}, {"iteration": 7}), keep=3)
    save(tmp_path, example(7), keep=3)
    assert_same(load(tmp_path / "step-000007"), example(7))
    assert names(tmp_path) == ["latest", "step-000007"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, example(7), keep=3)
    flip(path / name)
    with pytest.raises(InputError) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{path / name}: ")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_and_a_cut_file_are_found_and_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, example(7), keep=3)
    content = (path / name).read_bytes()
    for damage in (lambda f: f.write_bytes(content[:-9]), Path.unlink):
        damage(path / name)
        with pytest.raises(InputError) as refusal:
            load(path)
        assert str(refusal.value).startswith(f"{path / name}: ")


def test_no_flipped_bit_of_the_manifest_does_harm(tmp_path: Path) -> None:
    path = save(tmp_path, example(7), keep=3)
    manifest = (path / "manifest.json").read_bytes()
    refused = 0
    for position in range(len(manifest)):
        flip(path / "manifest.json", position, mask=0x01)
        try:
            assert_same(load(path), example(7))  # white space and the like
        except InputError:
            refused += 1
        (path / "manifest.json").write_bytes(manifest)
    assert refused > len(manifest) / 2


def test_a_manifest_that_describes_other_tensors_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, example(7), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tensors"]["adapter/layers.0.lora_a"][0] = [3, 4]
    files.write_json(path / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"manifest\.json: tensors differ"):
        load(path)


def test_loading_walks_back_to_the_newest_good_one_and_says_why(tmp_path: Path) -> None:
    for iteration in (2, 4, 6, 8):
        save(tmp_path, example(iteration), keep=9)
    flip(tmp_path / "step-000008" / "adapter.safetensors")
    (tmp_path / "step-000006" / "state.json").unlink()
    found, skipped = load_newest(tmp_path)
    assert_same(found, example(4))
    assert len(skipped) == 2
    assert "step-000008/adapter.safetensors" in skipped[0]
    assert "damaged" in skipped[0]
    assert "step-000006/state.json: missing" in skipped[1]


def test_the_newest_loads_without_complaint_even_if_the_pointer_is_lost(tmp_path: Path) -> None:
    for iteration in (9, 10, 100):
        save(tmp_path, example(iteration), keep=9)
    (tmp_path / "latest").unlink()
    found, skipped = load_newest(tmp_path)
    assert (found.iteration, skipped) == (100, [])


def test_without_a_good_one_the_reasons_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is none.*start anew in another --output"):
        load_newest(tmp_path)
    flip(save(tmp_path, example(2), keep=1) / "state.json")
    with pytest.raises(InputError, match=r"no usable checkpoint .*step-000002/state\.json"):
        load_newest(tmp_path)


def test_of_many_damaged_ones_the_newest_is_told_and_the_others_counted(tmp_path: Path) -> None:
    for iteration in (2, 4, 6):
        flip(save(tmp_path, example(iteration), keep=9) / "state.json")
    with pytest.raises(InputError, match=r"step-000006/state\.json.*; 2 older ones too\)") as told:
        load_newest(tmp_path)
    assert str(told.value).count("state.json") == 1


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    for iteration in (8, 9, 10, 11):
        save(tmp_path, example(iteration), keep)
    expected = [f"step-{i:06d}" for i in (8, 9, 10, 11)][-keep:]
    assert names(tmp_path) == ["latest", *expected]
    assert [p.name for p in step_directories(tmp_path)] == expected[::-1]


def test_a_checkpoint_just_written_outlives_a_damaged_newer_one(tmp_path: Path) -> None:
    save(tmp_path, example(2), keep=2)
    flip(save(tmp_path, example(4), keep=2) / "state.json")
    # resumed from 2, stopped at 3, now keeping one only
    save(tmp_path, example(3), keep=1)
    assert load_newest(tmp_path)[0].iteration == 3


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    real: Callable[..., Any] = getattr(checkpoint, name)
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise OSError("No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, name, failing)


@pytest.mark.parametrize(
    ("name", "call"),
    [("save_arrays", 1), ("save_arrays", 2), ("write_json", 1), ("write_manifest", 1)],
)
def test_a_failure_midway_leaves_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    save(tmp_path, example(2), keep=1)
    fail_at(monkeypatch, name, call)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, example(4), keep=1)
    assert names(tmp_path) == ["latest", "step-000002"]
    assert_same(load_newest(tmp_path)[0], example(2))
    assert (tmp_path / "latest").read_text() == "step-000002\n"


@pytest.mark.parametrize("point", ["fsync_tree", "swap_directory"])
def test_a_process_killed_midway_leaves_no_directory_with_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    save(tmp_path, example(2), keep=3)
    with monkeypatch.context() as killed, pytest.raises(ZeroDivisionError):
        killed.setattr(files, point, lambda *_: 1 / 0)
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # a dead process cleans up nothing
        save(tmp_path, example(4), keep=3)
    assert len(names(tmp_path)) == 3  # latest, step-000002 and the debris
    assert not (tmp_path / "step-000004").exists()
    found, skipped = load_newest(tmp_path)
    assert (found.iteration, skipped) == (2, [])
    save(tmp_path, example(4), keep=3)  # the debris is not in the way
    assert_same(load_newest(tmp_path)[0], example(4))


def run_state(**changes: Any) -> RunState:
    controller = KLController("decay", 1 / 3, 1e-4 / 7, 1.0, 0.1, 1000.0, 1e-6, 1e-3, 1 / 7, 1 / 9)
    return RunState(controller, ScoreNormalizer(0.99, 5.0), **changes)


@pytest.mark.parametrize("best", [Best(), Best(4, 10 / 3)])
def test_the_state_of_a_run_survives_the_file(tmp_path: Path, best: Best) -> None:
    state = run_state(best=best, iteration=4, tokens_seen=12345, skipped_in_a_row=2)
    observed = RunState(**{**vars(state), "normalizer": state.normalizer.observe([0.1, 0.7])})
    path = save(tmp_path, Checkpoint(4, {}, {}, observed.to_json()), keep=1)
    fresh = RunState(
        KLController("decay", 9.0, 9.0, 1.0, 0.1, 1000.0, 1e-6, 1e-3), state.normalizer
    )
    assert fresh.with_json(load(path).state) == observed


def test_a_state_from_before_there_was_a_decay_is_read() -> None:
    state = run_state(iteration=3)
    saved = {k: v for k, v in state.to_json().items() if not k.startswith("decay")}
    assert state.with_json(saved).controller.decay == 0.0
