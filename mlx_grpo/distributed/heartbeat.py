"""Who is still there: each rank holds a connection to both of its neighbours in the ring.

A collective waits for every rank and may wait for ever. So a rank gives a sign of life each second;
its neighbours notice when it ends or falls silent, pass that on, and what a main thread does not
end by itself is ended for it. The connections are made before MLX makes its own, to the same
addresses, so that a rank that is missing at the start is named too.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Literal, NoReturn

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import StopRequested

MEET_SECONDS = 60.0
"""For all ranks to start."""
BEAT_SECONDS = 1.0
SILENT_SECONDS = 15.0
"""A rank without a sign of life is given up: it hangs, or its machine or its cable is gone."""
GRACE_SECONDS = 10.0
"""For a main thread to stop by itself once a rank has left."""
SAVE_SECONDS = 60.0
"""The same where it was only told to stop: nobody is lost, and rank 0 has something to save."""
HEARD_SECONDS = 2.0
"""For news to go around."""

Address = tuple[str, int]


@dataclass(frozen=True)
class Left:
    """A rank that is no longer there."""

    rank: int
    host: str
    kind: Literal["done", "stopped", "failed", "lost"]
    """`lost`: it did not say so itself."""
    why: str = ""


class RankLost(RuntimeError):
    """Another rank has failed, ended or hangs; one of those that are left has said so."""


@dataclass(frozen=True)
class Neighbour:
    """The other end of a connection."""

    rank: int
    host: str
    line: Connection


class Heartbeat:
    """Signs of life to and from the neighbours, in a thread of its own."""

    def __init__(self, rank: int, neighbours: Sequence[Neighbour], tell: Callable[[str], None]):
        """Start.

        Args:
            neighbours: from `meet`.
            tell: shows a line to people; called on one rank only.
        """
        self.rank, self._tell = rank, tell
        self._heard = {n.line: (n, time.monotonic()) for n in neighbours}
        self._left: Left | None = None
        self._news, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Nothing while all ranks are there.

        Raises:
            StopRequested: another rank was asked to stop.
            RankLost: another rank has failed, ended or hangs.
        """
        if self._left:
            self._leaving.set()  # from here on the main thread ends by itself
            if self._left.kind == "stopped":
                raise StopRequested
            raise RankLost(_line(self._left))

    def explain(self, error: Exception) -> NoReturn:
        """Raise what lies behind the failure of a collective."""
        self._news.wait(HEARD_SECONDS)
        self.check()
        raise error

    def leave(self, kind: Literal["done", "stopped", "failed"], why: str = "") -> None:
        """Say goodbye, unless the run ends for a reason that another rank gave."""
        if kind == "failed" and self.rank:  # as a rule it fails for all, and rank 0 says so
            self._news.wait(HEARD_SECONDS)
        self._leaving.set()
        self._thread.join()
        self._send(Left(self.rank, socket.gethostname(), "done" if self._left else kind, why))
        for neighbour, _ in self._heard.values():
            _part(neighbour)

    def _run(self) -> None:
        beaten = 0.0
        while not self._leaving.is_set():
            for line in wait(list(self._heard), BEAT_SECONDS / 4):
                self._hear(line)  # type: ignore[arg-type]
            now = time.monotonic()
            if now - beaten > BEAT_SECONDS:
                beaten = now
                self._send(None)
            for neighbour, last in list(self._heard.values()):
                if now - last > SILENT_SECONDS:
                    self._lose(neighbour, f"no sign of life for {SILENT_SECONDS:g} s")

    def _hear(self, line: Connection) -> None:
        neighbour, _ = self._heard[line]
        try:
            said = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            self._lose(neighbour, "its process has ended")
            return
        self._heard[line] = (neighbour, time.monotonic())
        if said:
            left = Left(**said)
            if left.rank == neighbour.rank:
                del self._heard[line]
                line.close()  # which tells it that it was heard
            if left.kind != "done":
                self._learn(left)

    def _lose(self, neighbour: Neighbour, why: str) -> None:
        self._heard.pop(neighbour.line)
        self._learn(Left(neighbour.rank, neighbour.host, "lost", why))

    def _learn(self, left: Left) -> None:
        """The first news counts: it is passed on, said by one rank, and ends this one."""
        if self._left:
            return
        self._left = left
        self._send(left)
        speaker = 0 if left.rank else 1  # rank 0 speaks for itself where it can
        if self.rank == speaker and (left.kind == "lost" or (left.kind == "failed" and left.rank)):
            self._tell(_line(left))
        self._news.set()
        threading.Thread(target=self._end, args=(left,), daemon=True).start()

    def _end(self, left: Left) -> None:
        stopped = left.kind == "stopped"
        if not self._leaving.wait(SAVE_SECONDS if stopped else GRACE_SECONDS):
            if stopped and self.rank == (0 if left.rank else 1):
                self._tell(_line(left))
            os._exit(2)

    def _send(self, said: Left | None) -> None:
        message = json.dumps(said and asdict(said)).encode()
        for line in list(self._heard):
            try:
                line.send_bytes(message)
            except OSError:  # it is gone: reading says so
                continue


def _line(left: Left) -> str:
    why = left.why or "was told to stop, and the others did not come to save"
    remedy = "" if left.kind == "failed" else "; continue with --resume"
    return f"rank {left.rank} on {left.host}: {why}{remedy}"


def _part(neighbour: Neighbour) -> None:
    """Read until it has heard the goodbye or says its own: a connection that is closed on unread
    messages is reset, and loses what was sent."""
    try:
        while neighbour.line.poll(HEARD_SECONDS):
            said = json.loads(neighbour.line.recv_bytes())
            if said and said["rank"] == neighbour.rank:
                break
    except (EOFError, OSError):
        return
    neighbour.line.close()


def meet(addresses: Sequence[Address], rank: int, seconds: float = MEET_SECONDS) -> list[Neighbour]:
    """Connect to both neighbours; returns when all ranks have.

    Args:
        addresses: where each rank listens.

    Raises:
        InputError: a port is taken, or a rank did not come; it is named.
    """
    right, left = (rank + 1) % len(addresses), (rank - 1) % len(addresses)
    deadline = time.monotonic() + seconds
    patience = deadline + 2 * HEARD_SECONDS  # who calls in vain is the first to say so
    calling = answered = None
    with _listening(addresses[rank], rank) as door:
        while not (calling and answered):
            calling = calling or _call(addresses[right], rank)
            answered = answered or _answer(door, left, rank)
            if time.monotonic() > (patience if calling else deadline):
                raise _absent(addresses, left if calling else right, seconds)
    try:
        called = Neighbour(right, _heard(calling, right, patience), calling)
        for _ in range(2):  # the first round ends when all are here, the second tells them
            if rank == 0:
                _greet(calling, rank)
            _heard(answered.line, left, patience)
            if rank:
                _greet(calling, rank)
    except TimeoutError:
        raise _absent(addresses, left, seconds) from None
    except (EOFError, OSError, ValueError) as e:  # who has left says why, or mlx.launch does
        raise InputError(f"rank {rank} on {socket.gethostname()}: another rank has left") from e
    return [answered, called]


def _absent(addresses: Sequence[Address], rank: int, seconds: float) -> InputError:
    return InputError(
        f"rank {rank} on {_shown(addresses[rank])}: did not connect within {seconds:g} s; does "
        "this address reach it, and does mlx-grpo run there?"
    )


def _listening(address: Address, rank: int) -> socket.socket:
    try:
        door = socket.create_server(address)
    except OSError as e:
        raise InputError(
            f"rank {rank} on {socket.gethostname()}: cannot listen on {_shown(address)} "
            f"({e.strerror}); choose other ports with mlx.launch --starting-port"
        ) from e
    door.settimeout(0.1)
    return door


def _shown(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def _call(address: Address, rank: int) -> Connection | None:
    try:
        connected = socket.create_connection(address, timeout=1.0)
    except OSError:  # not yet there
        return None
    return _greet(_line_of(connected), rank)


def _answer(door: socket.socket, rank: int, me: int) -> Neighbour | None:
    """The neighbour who calls, and None where nobody does, or somebody else."""
    try:
        line = _line_of(door.accept()[0])
    except TimeoutError:
        return None
    try:
        host = _heard(line, rank, time.monotonic() + HEARD_SECONDS)
        return Neighbour(rank, host, _greet(line, me))
    except (EOFError, OSError, ValueError):
        line.close()
        return None


def _line_of(connected: socket.socket) -> Connection:
    connected.setblocking(True)
    return Connection(connected.detach())


def _greet(line: Connection, rank: int) -> Connection:
    line.send_bytes(json.dumps([rank, socket.gethostname()]).encode())
    return line


def _heard(line: Connection, rank: int, deadline: float) -> str:
    """The host of the rank that greets.

    Raises:
        TimeoutError, EOFError, OSError: nobody does.
        ValueError: it is somebody else.
    """
    if not line.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    said = json.loads(line.recv_bytes(1024))
    if not isinstance(said, list) or said[:1] != [rank]:
        raise ValueError(f"expected rank {rank}, heard {said}")
    return str(said[1])
