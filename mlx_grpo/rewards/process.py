"""The trainer's end of a custom reward function that runs in a process of its own."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.rewards import worker as reward_worker
from mlx_grpo.rewards.worker import RewardError

POLL_SECONDS = 0.1
LONGEST_TIMEOUT = 1e7
"""Seconds, four months: what the timers of every system take."""
LONGEST_REPLY = 1 << 24
"""Bytes; a number and its comma take less than 30, a complaint less than a thousand."""
PIECE = 1 << 16
"""Bytes that are read at once, and kept together of a printed line."""
# The working directory may hold files named like modules that the worker itself imports.
START = (
    "import sys; sys.path = [p for p in sys.path if p]; sys.argv = sys.argv[1:]; "
    "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def no_relay(line: str) -> None:
    """What a function prints is dropped."""


class RewardProcess:
    """A process that holds one reward function; it ends with `close`, or when the trainer dies.

    Each request has a number. A reply must carry it, the number of the process that was started,
    and as many scores as there were completions: what a function forks or leaves behind cannot
    answer in another's place.
    """

    def __init__(
        self,
        spec: str,
        timeout: float,
        relay: Callable[[str], None] = no_relay,
        worker: tuple[str, ...] = (reward_worker.__file__,),
        what: str = "reward function",
        flag: str = "--reward-timeout",
    ):
        """Start it and load the function.

        Args:
            spec: `module:function` or `path/file.py:function`.
            timeout: seconds that a call may take; loading may take longer.
            relay: told each line that the function prints.
            worker: the program to run, and more arguments for it.
            what: is loaded, for complaints.
            flag: sets the timeout, for complaints.

        Raises:
            InputError: no such module, file or function.
        """
        self.timeout = min(timeout, LONGEST_TIMEOUT)
        self._relay, self._flag = relay, flag
        self._requests = 0
        self._replied, self._printed = bytearray(), b""
        self._closed = False
        program, *more = worker
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-c", START, program, spec, str(self.timeout), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is the trainer's to answer
        )
        assert self._process.stderr
        self._stderr = [self._process.stderr]
        """Nothing any more once it has ended."""
        try:
            self.loaded = self._reply(None, never_stop)
        except RewardError as e:
            self.close()
            raise InputError(f"{what} {spec}: {e}") from e
        self.file: str | None = self.loaded["file"]

    def __call__(
        self, arguments: dict[str, Any], safe_point: SafePoint = never_stop
    ) -> list[float | None]:
        """A number per completion, None where the function does not apply.

        Raises:
            RewardError: the function raised, returned something else, ended its process, answered
                twice, or took longer than the timeout.
        """
        found = self.ask({"arguments": arguments}, self.timeout, safe_point).get("scores")
        expected = len(arguments["completions"])
        if not isinstance(found, list) or [_is_score(s) for s in found] != [True] * expected:
            self.close()
            raise RewardError(f"its process did not answer with {expected} numbers")
        return found

    def ask(
        self, what: dict[str, Any], timeout: float, safe_point: SafePoint = never_stop
    ) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            RewardError: an error was the reply, or there was none in time.
        """
        if self._closed:
            raise RewardError(f"its process ended (exit status {self._process.returncode})")
        assert self._process.stdin
        self._requests += 1
        request = json.dumps({"request": self._requests, **what}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it is gone; the reply says so
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        return self._reply(timeout, safe_point)

    def _reply(self, timeout: float | None, safe_point: SafePoint) -> dict[str, Any]:
        end = time.monotonic() + timeout if timeout else None
        try:
            while b"\n" not in self._replied and self._read():
                safe_point()
                if end and time.monotonic() > end:
                    raise RewardError(
                        f"no answer within {timeout:g} s; fix it or raise {self._flag}"
                    )
            self._hear()
            reply = self._checked()
        except BaseException:  # a late answer would be taken for the next one's
            self.close()
            raise
        if "error" in reply:
            raise RewardError(" ".join(str(reply["error"]).split()))
        return reply

    def _read(self) -> bool:
        """Wait a moment for a piece of a reply; False once there is none to come."""
        stdout = self._process.stdout
        assert stdout
        # looked at before: what it wrote last is there. Others may hold the pipe longer than it
        ended = self._process.poll() is not None
        listening = [stdout, *self._stderr]
        ready, _, _ = select.select(listening, [], [], 0 if ended else POLL_SECONDS)
        self._hear()
        if stdout not in ready:
            return not ended
        found = os.read(stdout.fileno(), PIECE)
        self._replied += found
        if len(self._replied) > LONGEST_REPLY:
            raise RewardError(f"its process answered with more than {LONGEST_REPLY >> 20} MB")
        return bool(found)

    def _hear(self) -> None:
        """Hand on what was printed by now, as much as a pipe holds."""
        if not self._stderr or not select.select(self._stderr, [], [], 0)[0]:
            return
        found = os.read(self._stderr[0].fileno(), PIECE)
        *lines, rest = (self._printed + found).split(b"\n")
        if not found:
            self._stderr.clear()
        if len(rest) > PIECE or (rest and not found):
            lines, rest = [*lines, rest], b""
        self._printed = rest
        for line in lines:
            self._relay(line.decode("utf-8", "backslashreplace"))

    def _checked(self) -> dict[str, Any]:
        """The reply that has arrived, if it is the one to the last request, and the only one."""
        line, whole, rest = bytes(self._replied).partition(b"\n")
        self._replied.clear()
        if not whole:
            raise RewardError(f"its process ended (exit status {self._process.wait()})")
        try:
            reply = json.loads(line)
            sender, number = reply["process"], reply["request"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise RewardError("its process wrote something that is no answer") from None
        if (sender, number) != (self._process.pid, self._requests) or rest:
            raise RewardError(
                "it answered more than once; a process that it forks must end with os._exit"
            )
        return dict(reply)

    def close(self) -> None:
        """End the process and those that it started, whatever they are doing."""
        if self._closed:
            return
        self._closed = True
        # gone already; or, on macOS, only waiting to be waited for
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
        self._process.kill()
        self._process.wait()
        self._hear()
        # not until the pipes end: a daemon that it left may hold them for ever
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _is_score(value: object) -> bool:
    return value is None or type(value) is float
