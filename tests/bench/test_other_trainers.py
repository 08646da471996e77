"""Other trainers: run once, in processes of their own, and what they leave."""

from pathlib import Path

import pytest

from bench.learning import other_trainers
from bench.learning.other_trainers import FASTEST, Trainer, their_adapters, trained_by
from mlx_grpo.config.settings import train_config
from mlx_grpo.core.errors import InputError

TRAINER = """
import argparse, json, pathlib
import mlx.core as mx
parser = argparse.ArgumentParser()
for flag in "variant learn every prompts iterations tokens seed learning-rate".split():
    parser.add_argument("--" + flag)
args = parser.parse_args()
assert args.learning_rate != "0.5", "too much"
place = pathlib.Path(args.learn)
for step in (5, 10):
    file = place / f"step-{step:06d}.safetensors"
    mx.save_safetensors(str(file), {"lora_a": mx.full((2,), step)})
print("noise")
print(json.dumps({"seconds": [9.0] + [2.0] * int(args.iterations), "prompts": args.prompts}))
"""


def test_a_trainer_is_run_once_and_leaves_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "model.py").touch()
    monkeypatch.setattr(other_trainers, "PEERS", tmp_path)
    run = tmp_path / "run"
    config = train_config(output=str(run), num_iterations=10)
    with pytest.raises(InputError, match=r"trainer.py: failed, see .*log.txt"):
        trained_by(Trainer("trainer.py", "default", 0.5), config)
    assert "too much" in (run / "log.txt").read_text()
    calm = Trainer("trainer.py", "default", 0.1)
    assert trained_by(calm, config) == [9.0] + [2.0] * 9
    found = [(i, adapter["lora_a"].tolist()) for i, adapter in their_adapters(run)]
    assert found == [(5, [5, 5]), (10, [10, 10])]
    (tmp_path / "trainer.py").unlink()
    assert trained_by(calm, config) == [9.0] + [2.0] * 9  # what is done is not done again
    with pytest.raises(InputError, match="has 10 iterations"):
        trained_by(calm, train_config(output=str(run), num_iterations=20))


def test_every_trainer_has_its_script() -> None:
    assert all((other_trainers.PEERS / script).is_file() for script, _ in FASTEST.values())
