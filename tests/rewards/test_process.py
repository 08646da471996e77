"""A user's function runs in a process of its own: whatever it does, the run ends in one line."""

import os
import time
from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import StopRequested
from mlx_grpo.rewards.functions import CustomReward, load_reward
from mlx_grpo.rewards.process import RewardProcess
from mlx_grpo.rewards.worker import RewardError
from tests.helpers.answers import group

ARGUMENTS = {"completions": ["a", "bc"]}


def process(tmp_path: Path, body: str, timeout: float = 60.0) -> RewardProcess:
    file = tmp_path / "mine.py"
    file.write_text(f"import os, re, time, sys\n\ndef f(completions):\n    {body}\n")
    return RewardProcess(f"{file}:f", timeout)


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


def test_what_a_function_prints_is_no_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    talking = process(tmp_path, "print('hello'); sys.stdout.flush(); return [1, 2]")
    assert talking(ARGUMENTS) == talking(ARGUMENTS) == [1.0, 2.0]
    talking.close()
    assert capfd.readouterr() == ("", "hello\nhello\n")


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
