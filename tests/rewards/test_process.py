"""A user's function runs in a process of its own: whatever it does, the run ends in one line."""

import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import StopRequested
from mlx_grpo.rewards.functions import CustomReward, load_reward
from mlx_grpo.rewards.process import RewardProcess, no_relay
from mlx_grpo.rewards.worker import RewardError
from tests.helpers.answers import group

ARGUMENTS = {"completions": ["a", "bc"]}


def process(
    tmp_path: Path,
    body: str,
    timeout: float = 60.0,
    relay: Callable[[str], None] = no_relay,
) -> RewardProcess:
    file = tmp_path / "mine.py"
    body = textwrap.indent(body, "    ")
    file.write_text(f"import os, re, time, sys\n\ndef f(completions):\n{body}\n")
    return RewardProcess(f"{file}:f", timeout, relay)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(1000)",
        "while True: pass",
        "re.match(r'(a+)+$', 'a' * 60 + 'b')",  # never lets another thread run
    ],
)
def test_a_function_that_hangs_is_ended_on_time(tmp_path: Path, body: str) -> None:
    hanging = process(tmp_path, body, timeout=0.3)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer within 0\.3 s; .*--reward-timeout"):
        hanging(ARGUMENTS)
    assert time.monotonic() - start < 30  # it would be for ever
    assert gone(hanging._process.pid)


def test_a_function_that_ends_its_process_is_told(tmp_path: Path) -> None:
    dying = process(tmp_path, "os._exit(7)")
    for _ in range(2):  # and it stays dead
        with pytest.raises(RewardError, match=r"its process ended \(exit status 7\)"):
            dying(ARGUMENTS)


def test_a_stop_is_answered_while_a_function_works(tmp_path: Path) -> None:
    def stop() -> None:
        raise StopRequested

    working = process(tmp_path, "time.sleep(1000)")
    with pytest.raises(StopRequested):
        working(ARGUMENTS, stop)
    assert gone(working._process.pid)


def test_what_a_function_prints_is_no_answer_and_is_handed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []
    body = "print('hello\\nyou'); os.system('echo child >&2'); return [1, 2]"
    talking = process(tmp_path, body, relay=heard.append)
    assert talking(ARGUMENTS) == talking(ARGUMENTS) == [1.0, 2.0]
    talking.close()
    assert sorted(heard) == ["child", "child", "hello", "hello", "you", "you"]
    assert capfd.readouterr() == ("", "")


def test_what_it_printed_last_and_more_than_a_pipe_holds_is_handed_on_too(tmp_path: Path) -> None:
    heard: list[str] = []
    body = "for i in range(9000):\n    print('y' * 50, flush=True)\nos._exit(3)"
    talking = process(tmp_path, body, relay=heard.append)
    with pytest.raises(RewardError, match="exit status 3"):
        talking(ARGUMENTS)
    assert heard == ["y" * 50] * 9000


def test_a_function_may_read_no_input_meant_for_the_worker(tmp_path: Path) -> None:
    reading = process(tmp_path, "return [len(sys.stdin.read()), 1]")
    assert reading(ARGUMENTS) == [0.0, 1.0]
    reading.close()


def test_it_ends_with_the_one_who_asks(tmp_path: Path) -> None:
    idle = process(tmp_path, "return [1, 2]")
    assert idle._process.stdin
    idle._process.stdin.close()  # as the system does when the trainer dies
    assert idle._process.wait(30) == 0


def test_a_module_named_like_one_of_the_standard_library_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not me')\n")
    monkeypatch.chdir(tmp_path)
    fine = process(tmp_path, "return [1, 2]")
    assert fine(ARGUMENTS) == [1.0, 2.0]
    fine.close()


def test_a_module_beside_the_user_is_found_and_its_file_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text("def f(completions, topic):\n    return [len(topic)]\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("beside:f")
    assert reward(group("a", topic="tea")) == [3.0]
    assert reward.file == str(tmp_path / "beside.py")


def test_the_complaint_is_one_line_with_prompt_and_function(tmp_path: Path) -> None:
    loud = process(tmp_path, "raise ValueError('two\\nlines')")
    with pytest.raises(InputError) as failure:
        CustomReward("loud", loud)(group("a", "b"))
    complaint = "reward 'loud' failed on prompt 'p1': ValueError: two lines (mine.py:4)"
    assert str(failure.value) == complaint


def test_what_a_reward_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "forks.py"
    file.write_text(
        "import multiprocessing, time\n"
        "def forks(completions):\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    process = RewardProcess(f"{file}:forks", timeout=0.5)
    with pytest.raises(RewardError, match=r"no answer within 0\.5 s"):
        process({"completions": ["a"]})  # returns: nobody holds its pipe any more


FORKS = "if os.fork() == 0: return [9.0, 9.0]\nreturn [len(c) for c in completions]"
RAISES = "if os.fork() == 0: raise SystemExit(1)\nreturn [len(c) for c in completions]"


@pytest.mark.parametrize("body", [FORKS, RAISES])
def test_a_function_that_forks_and_returns_twice_shifts_no_scores(
    tmp_path: Path, body: str
) -> None:
    forking = process(tmp_path, body)
    for n in range(1, 9):
        assert forking({"completions": ["a" * n, "b" * 2 * n]}) == [n, 2 * n]
    forking.close()


WRITES = """
import json
for fd in range(3, 30):
    try:
        os.write(fd, (json.dumps(REPLY) + chr(10)).encode())
    except OSError:
        pass
return [1, 2]
"""


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ("{'scores': [9.0, 9.0]}", "no answer"),
        ("[1]", "no answer"),
        ("{'process': os.getpid(), 'request': 0, 'scores': [9.0, 9.0]}", "answered more than once"),
        ("{'process': 1, 'request': 1, 'scores': [9.0, 9.0]}", "answered more than once"),
        ("'x' * (1 << 25)", "more than 16 MB"),
    ],
)
def test_an_answer_that_is_not_the_one_asked_for_is_refused(
    tmp_path: Path, reply: str, complaint: str
) -> None:
    forging = process(tmp_path, WRITES.strip().replace("REPLY", reply))
    with pytest.raises(RewardError, match=complaint):
        forging(ARGUMENTS)
    assert gone(forging._process.pid)


@pytest.mark.parametrize(
    "scores",
    ["[9.0]", "[9.0, 9.0, 9.0]", "'ab'", "None", "[True, 1.0]", "['1', 2.0]", "{'0': 1, '1': 2}"],
)
def test_the_number_of_scores_is_checked_on_this_side_too(tmp_path: Path, scores: str) -> None:
    body = WRITES.replace("REPLY", f"{{'process': os.getpid(), 'request': 1, 'scores': {scores}}}")
    forging = process(tmp_path, body.strip().replace("return [1, 2]", "time.sleep(60)"))
    with pytest.raises(RewardError, match="did not answer with 2 numbers"):
        forging(ARGUMENTS)


def test_an_answer_left_behind_by_the_last_call_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    late = WRITES.strip().replace("REPLY", "{'process': own, 'request': 1, 'scores': [9.0, 9.0]}")
    late = late.replace("return [1, 2]", "os._exit(0)")
    child = textwrap.indent(f"time.sleep(0.3)\n{late}", "    ")
    body = f"own = os.getpid()\nif os.fork() == 0:\n{child}\nreturn [1, 2]"
    forging = process(tmp_path, body)
    assert forging(ARGUMENTS) == [1, 2]
    time.sleep(1)
    with pytest.raises(RewardError, match="answered more than once"):
        forging(ARGUMENTS)


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(30)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize("end", ["return [1, 2]", "os._exit(5)", "time.sleep(100)"])
def test_a_daemon_that_a_function_leaves_holds_nobody_up(tmp_path: Path, end: str) -> None:
    leaving = process(tmp_path, DAEMON.strip() + "\n" + end, timeout=2.0)
    start = time.monotonic()
    if "return" in end:
        assert leaving(ARGUMENTS) == [1.0, 2.0]
    else:
        with pytest.raises(RewardError, match=r"exit status 5|no answer within 2 s"):
            leaving(ARGUMENTS)
    leaving.close()
    leaving.close()
    assert time.monotonic() - start < 25  # the daemon is still there


def test_a_function_that_becomes_a_daemon_itself_has_ended_its_process(tmp_path: Path) -> None:
    body = "if os.fork(): os._exit(0)\nos.setsid()\nreturn [1, 2]"
    with pytest.raises(RewardError, match="its process ended"):
        process(tmp_path, body)(ARGUMENTS)


def test_a_system_that_refuses_to_signal_what_has_ended_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    ended = process(tmp_path, "return [1, 2]")
    monkeypatch.setattr(os, "killpg", refuses)
    ended.close()
    assert gone(ended._process.pid)


@pytest.mark.parametrize("timeout", [1e9, 1e30, float("inf")])
def test_a_timeout_longer_than_any_timer_is_a_long_one(tmp_path: Path, timeout: float) -> None:
    patient = process(tmp_path, "return [1, 2]", timeout)
    assert patient(ARGUMENTS) == [1.0, 2.0]
    patient.close()
