"""Shares of a batch, watched neighbours, agreement; whole runs of several ranks on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import StopRequested
from mlx_grpo.distributed import heartbeat as watch
from mlx_grpo.distributed.heartbeat import meet
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.roles import new_actor
from mlx_grpo.run.provenance import recorded
from mlx_grpo.training.agreement import CHECK_EVERY, check_adapter, check_inputs
from tests.helpers.ports import free_ports


def test_each_position_belongs_to_one_rank() -> None:
    for size in (1, 2, 3, 5):
        ranks = [Ranks(rank, size) for rank in range(size)]
        positions = list(range(7))
        assert sorted(p for r in ranks for p in positions[r.share]) == positions
        for minibatch in (range(0, 2), range(2, 4), range(6, 7)):
            own = [positions[r.share][r.own(minibatch)] for r in ranks]
            assert sorted(p for share in own for p in share) == list(minibatch)


def test_a_single_rank_needs_no_communication() -> None:
    arrays = {"a": mx.ones(2)}
    assert ALONE.gather("x") == ["x"]
    assert ALONE.merged([1, 2]) == [1, 2]
    assert ALONE.sum(arrays) is arrays
    assert ALONE.lead(arrays) is arrays


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"rank 0 on .*: cannot listen on 127.0.0.1:{port}"):
            meet([("127.0.0.1", port), ("127.0.0.1", 1)], 0)


def test_a_rank_that_does_not_come_is_named() -> None:
    addresses = [("127.0.0.1", port) for port in free_ports(2)]
    shown = f"{addresses[1][0]}:{addresses[1][1]}"
    with pytest.raises(InputError, match=f"rank 1 on {shown}: did not connect"):
        meet(addresses, 0, seconds=0.3)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_that_start_at_the_same_time_meet_their_neighbours(size: int) -> None:
    addresses = [("127.0.0.1", port) for port in free_ports(size)]
    for _ in range(5):  # on the same ports each time, as MLX takes them afterwards
        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(lambda rank: meet(addresses, rank, 20.0), range(size)))
        for rank, neighbours in enumerate(found):
            assert [n.rank for n in neighbours] == [(rank - 1) % size, (rank + 1) % size]
        for rank, (_, right) in enumerate(found):
            right.line.send_bytes(b"hello")
            assert found[(rank + 1) % size][0].line.recv_bytes() == b"hello"
        for neighbours in found:
            for n in neighbours:
                n.line.close()


def test_a_rank_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.5)
    near, far = Pipe()
    said: list[str] = []
    watching = watch.Heartbeat(0, [watch.Neighbour(1, "mac-b", near)], said.append)
    with pytest.raises(RuntimeError, match="rank 1 on mac-b: no sign of life"):
        watching.explain(ValueError("the collective failed"))
    assert said == ["rank 1 on mac-b: no sign of life for 0.5 s; continue with --resume"]
    far.close()


def test_a_rank_that_gives_signs_of_life_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    near, far = Pipe()
    both = [
        watch.Heartbeat(rank, [watch.Neighbour(1 - rank, "mac", line)], lambda _: None)
        for rank, line in enumerate((near, far))
    ]
    time.sleep(1.5)
    both[0].check()
    both[1].leave("stopped")
    with pytest.raises(StopRequested):
        both[0].explain(ValueError("the collective failed"))


class Told(Ranks):
    """Rank 0 of several that have told it something."""

    def __init__(self, told: list[Any]):
        super().__init__(0, len(told))
        object.__setattr__(self, "told", told)

    def gather(self, mine: Any) -> list[Any]:
        return self.told  # type: ignore[attr-defined,no-any-return]


def test_ranks_with_other_versions_or_inputs_are_refused() -> None:
    about = recorded(TrainConfig(), {"--prompts": "ab" * 32}, "dense fp32")
    newer = {**about, "versions": {**about["versions"], "mlx": "9.9"}}
    edited = {**about, "inputs": {"--prompts": "cd" * 32}}
    for other, complaint in ((newer, r"mlx 0\.\S+ -> 9\.9"), (edited, "--prompts other content")):
        with pytest.raises(InputError, match=f"rank 1 on mac-b: not what rank 0 has: {complaint}"):
            check_inputs(Told([("mac-a", about), ("mac-b", other)]), about)
    check_inputs(Told([("mac-a", about), ("mac-b", about)]), about)


def test_ranks_whose_adapters_part_are_refused(backbone: Backbone) -> None:
    actor = new_actor(backbone, 2, 1.0, 0).model
    check_adapter(Told([("mac-a", "1"), ("mac-b", "1")]), actor, CHECK_EVERY)
    check_adapter(Told([("mac-a", "1"), ("mac-b", "2")]), actor, CHECK_EVERY + 1)
    with pytest.raises(InputError, match="rank 1 on mac-b: after 10 iterations its adapter"):
        check_adapter(Told([("mac-a", "1"), ("mac-b", "2")]), actor, CHECK_EVERY)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Whole runs of 1, 2 and 3 ranks; in a process of its own, because it forks."""
    file = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [
        "-m",
        "bench.speed.ranks",
        "same",
        "stop",
        "kill",
        "--iterations",
        "3",
        "--kills",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(file)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert file.exists(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_several_ranks_train_what_one_does(measured: dict[str, Any]) -> None:
    assert len(measured["same"]) == 3
    for found in measured["same"].values():
        assert found["all_texts_equal"] and found["first_samples_equal"]
        assert max(found["relative_difference"].values()) < 1e-5  # of what one rank trained


def test_a_stopped_run_goes_on_with_another_number_of_ranks(measured: dict[str, Any]) -> None:
    found = measured["stop"]
    assert found["statuses"] == [130, 130]
    assert found["samples_equal"] and found["relative_difference"] < 1e-5


def test_where_a_rank_dies_the_others_end_and_the_run_goes_on(measured: dict[str, Any]) -> None:
    found = measured["kill"]
    assert found["resumed_equal"] == found["kills"] == 2, found["each"]
    named = found["one_line_names_the_rank"]
    assert named == found["others_ended_within_30_s"] == 2, found["each"]
