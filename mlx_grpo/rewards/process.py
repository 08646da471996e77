"""The trainer's end of a custom reward function that runs in a process of its own."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.rewards import worker as reward_worker
from mlx_grpo.rewards.worker import RewardError

POLL_SECONDS = 0.1
# The working directory may hold files named like modules that the worker itself imports.
START = (
    "import sys; sys.path = [p for p in sys.path if p]; sys.argv = sys.argv[1:]; "
    "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
)


class RewardProcess:
    """A process that holds one reward function; it ends with `close`, or when the trainer dies."""

    def __init__(self, spec: str, timeout: float):
        """Start it and load the function.

        Args:
            spec: `module:function` or `path/file.py:function`.
            timeout: seconds that a call may take; loading may take longer.

        Raises:
            InputError: no such module, file or function.
        """
        self.timeout = timeout
        worker = Path(reward_worker.__file__)
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-c", START, str(worker), spec, str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C is the trainer's to answer
        )
        try:
            self.file: str | None = self._reply(None, never_stop)["file"]
        except RewardError as e:
            raise InputError(f"reward function {spec}: {e}") from e

    def __call__(
        self, arguments: dict[str, Any], safe_point: SafePoint = never_stop
    ) -> list[float | None]:
        """A number per completion, None where the function does not apply.

        Raises:
            RewardError: the function raised, returned something else, ended its process, or took
                longer than the timeout.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it is gone; the reply says so
            pass
        scores: list[float | None] = self._reply(self.timeout, safe_point)["scores"]
        return scores

    def _reply(self, timeout: float | None, safe_point: SafePoint) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout
        end = time.monotonic() + timeout if timeout else None
        try:
            while not select.select([stdout], [], [], POLL_SECONDS)[0]:
                safe_point()
                if end and time.monotonic() > end:
                    raise RewardError(
                        f"no answer within {timeout:g} s; mend it or raise --reward-timeout"
                    )
            line = stdout.readline()
        except BaseException:  # a late answer would be taken for the next one's
            self.close()
            raise
        if not line:
            raise RewardError(f"its process ended (exit status {self._process.wait()})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RewardError(" ".join(reply["error"].split()))
        return reply

    def close(self) -> None:
        """End the process and those that it started, whatever they are doing."""
        with contextlib.suppress(ProcessLookupError):  # ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
        self._process.communicate()
