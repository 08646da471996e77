"""Loading ends in a learner, or in one line and nothing left behind."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.rewards import environments, functions
from mlx_grpo.rewards.process import RewardProcess
from mlx_grpo.rewards.worker import RewardError
from mlx_grpo.training.setup import load_learner

QUIET = Console(quiet=True)
HELPERS = Path(__file__).parent.parent / "helpers" / "environments.py"


@pytest.fixture
def short(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text("def short(completions): return [0.0] * len(completions)")
    return f"{tmp_path / 'rewards.py'}:short"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RewardProcess]:
    """The processes that are started."""
    found: list[RewardProcess] = []

    class Noted(RewardProcess):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            found.append(self)

    for module in (functions, environments):
        monkeypatch.setattr(module, "RewardProcess", Noted)
    return found


@pytest.mark.parametrize(
    ("wrong", "processes", "said"),
    [
        ({"reward": ("{short}", "nothing.py:there")}, 1, "nothing.py"),
        ({"eval_prompts": "nowhere.jsonl", "environment": f"{HELPERS}:Counter"}, 2, "nowhere"),
        ({"reward": (), "environment": f"{HELPERS}:OneTurn"}, 1, "no reward counts"),
    ],
)
def test_no_process_is_left_where_loading_fails(
    wrong: dict[str, Any],
    processes: int,
    said: str,
    train_arguments: dict[str, Any],
    short: str,
    started: list[RewardProcess],
) -> None:
    given = {**train_arguments, "rm_model": "none", "reward": (short,), **wrong}
    given["reward"] = tuple(short if spec == "{short}" else spec for spec in given["reward"])
    with pytest.raises(InputError, match=said):
        load_learner(train_config(**given), QUIET)
    assert len(started) == processes
    for process in started:
        with pytest.raises(RewardError, match="its process ended"):
            process.ask({}, 1.0)


def test_a_run_in_which_every_weight_is_0_is_refused(
    train_arguments: dict[str, Any], short: str
) -> None:
    own = {"rm_model": "none", "reward": (short,), "reward_weights": (0.0,)}
    with pytest.raises(InputError, match="no reward counts"):
        load_learner(train_config(**{**train_arguments, **own}), QUIET)
