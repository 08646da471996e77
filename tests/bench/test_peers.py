"""The comparison with other programs: its ratios, and that nothing in it is missing."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[2] / "bench" / "peers"


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts in bench/peers/ find each other as if run from the command line."""
    monkeypatch.syspath_prepend(str(PEERS))


def test_every_job_has_a_script_and_a_name_of_its_own() -> None:
    from run import JOBS

    assert all((PEERS / f"{job.script}.py").is_file() for job in JOBS)
    assert len({job.name for job in JOBS}) == len(JOBS)
    used = {job.script for job in JOBS} | {"common", "model", "run"}
    assert {file.stem for file in PEERS.glob("*.py")} == used


def test_ratios_compare_seconds_per_prompt_and_tokens_per_second_on_the_same_rows() -> None:
    from run import table

    results = {
        r["job"]: r
        for r in (
            {
                "job": "mlx-grpo, 4 prompts, everything",
                "seconds_per_prompt_iteration": 8.0,
                "peak_gb": 0.7,
            },
            {
                "job": "mlx-grpo, 6 prompts, defaults",
                "seconds_per_prompt_iteration": 5.0,
                "peak_gb": 0.7,
            },
            {
                "job": "mlx-grpo rollout, 16 prompts",
                "prompts": 16,
                "rollout_tokens_per_second": 200.0,
                "peak_gb": 0.9,
            },
            {"job": "a trainer", "seconds_per_prompt_iteration": 20.0, "rss_gb": 4.0},
            {"job": "a decoder", "prompts": 16, "rollout_tokens_per_second": 50.0, "peak_gb": 1.0},
            {"job": "another", "prompts": 1, "rollout_tokens_per_second": 50.0, "peak_gb": 1.0},
        )
    }
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table(results)[2:]]
    assert [row[-1] for row in rows] == ["", "", "", "2.50x / 4.00x", "4.00x", ""]
    assert rows[3] == ["a trainer", "", "20.0", "4.00 (RSS)", "2.50x / 4.00x"]


def test_of_several_turns_the_faster_counts() -> None:
    from run import faster

    slow, quick = (
        {"job": "a", "seconds_per_prompt_iteration": s, "peak_gb": s} for s in (9.0, 8.0)
    )
    assert faster(slow, quick) == faster(quick, slow) == {**quick, "turns": 2}
    rollouts = [{"job": "b", "rollout_tokens_per_second": s, "turns": 2} for s in (50.0, 60.0)]
    assert faster(*rollouts) == {**rollouts[1], "turns": 4}


def test_the_first_iteration_is_dropped_and_the_fastest_counts() -> None:
    from common import result

    found = result(
        Namespace(prompts=2, tokens=10, learn=None), 12, [9.0, 4.0, 3.0], [50.0, 20.0], 0.5
    )
    assert found["rollout_tokens_per_second"] == 12 * 10 / 3.0
    assert found["seconds_per_prompt_iteration"] == 10.0


def test_what_is_learnt_from_is_the_reward_for_constraints_and_an_adapter_is_kept_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import common

    monkeypatch.setattr(common, "ENDING", tmp_path)
    fields = json.dumps({"min_words": 2, "max_words": 3, "keyword": "rain"})
    rows = [{"messages": [], "ids": [1], "fields": fields}]
    (tmp_path / "constraints.json").write_text(json.dumps(rows))
    args = Namespace(learn=str(tmp_path), tokens=4, every=5)
    task = common.task(args, str.split)
    assert task.rows == rows and common.model_of(args) == tmp_path
    assert task.reward("It may rain.", fields) == 1.0
    assert task.reward("It may rain now", fields) == pytest.approx((1 - 1 / 3 + 1 + 0) / 3)
    assert common.kept_at(args, 10) == tmp_path / "step-000010.safetensors"
    assert common.kept_at(args, 11) is None
    assert common.kept_at(Namespace(learn=None, every=5), 10) is None
