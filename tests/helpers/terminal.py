"""A terminal of our own: a program runs on a pseudo-terminal, and a screen keeps what a person has
seen, that which scrolled away included."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import pyte

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds after which a program that says nothing more is taken to hang."""


def _at_a_terminal() -> None:
    """As a person's shell starts a program, even where these tests run under nohup."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _keep_at_ctrl_c(slave: int) -> None:
    """At a Ctrl-C a terminal drops what nobody has read yet, which on a busy machine may be half
    of a redrawn screen. Here nothing is dropped: all that a program wrote can be asserted."""
    attributes = termios.tcgetattr(slave)
    attributes[3] |= termios.NOFLSH
    termios.tcsetattr(slave, termios.TCSANOW, attributes)


class Screen(pyte.HistoryScreen):
    """A screen that shows faint text in grey; pyte itself drops that attribute."""

    def select_graphic_rendition(self, *attrs: int) -> None:
        """Bright black for what is to be faint."""
        faint = attrs[:1] == (2,)
        super().select_graphic_rendition(*((90, *attrs[1:]) if faint else attrs))


class Terminal:
    """A program on a screen of `columns` x `lines`."""

    def __init__(
        self,
        command: list[str],
        columns: int = 80,
        lines: int = 24,
        stderr: Any = None,
        **environment: str,
    ):
        self.screen = Screen(columns, lines, history=100_000, ratio=1.0)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        """All that the program wrote."""
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        _keep_at_ctrl_c(slave)
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "CI")}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=stderr or slave,
            env={
                **inherited,
                "TERM": "xterm-256color",
                "PYTHONPATH": str(ROOT),
                **environment,
            },
            start_new_session=True,
            preexec_fn=_at_a_terminal,
        )
        os.close(slave)
        self._written: SimpleQueue[bytes] = SimpleQueue()
        self._left = Event()
        self._reader = Thread(target=self._read_at_once, daemon=True)
        self._reader.start()

    def _read_at_once(self) -> None:
        """As a person's terminal does, so that no program waits for a reader."""
        found = b"?"
        while found and not self._left.is_set():
            if select.select([self._master], [], [], 0.02)[0]:
                try:
                    found = os.read(self._master, 65536)
                except OSError:  # how Linux says that the other side is closed
                    found = b""
                self._written.put(found)

    def until(self, text: str) -> None:
        """Read until the screen shows `text`."""
        while text not in self.seen():
            assert self._read(), f"ended without {text!r}:\n{self.seen()}"

    def until_shown(self, text: str) -> None:
        """Read until `text` is on the screen now, not above it."""
        while text not in "\n".join(self.screen.display):
            assert self._read(), f"ended without {text!r}:\n{self.seen()}"

    def until_it_waits(self) -> None:
        """Until the program sleeps. After a prompt it waits for a key then; a Ctrl-C between the
        two is not seen by Python's readline before the next key."""
        end = time.monotonic() + PATIENCE
        while self._state() not in "SI":
            assert time.monotonic() < end, f"never waits:\n{self.seen()}"

    def _state(self) -> str:
        """As `ps` has it: R runs, S and I (idle, on macOS) sleep."""
        place = Path(f"/proc/{self.process.pid}/stat")
        if place.exists():
            return place.read_text().rpartition(")")[2].split()[0]
        command = ["ps", "-o", "state=", "-p", str(self.process.pid)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout[:1]

    def send(self, keys: bytes) -> None:
        """Type."""
        os.write(self._master, keys)

    def hang_up(self) -> None:
        """Close the terminal, as the window's button does."""
        self._left.set()
        self._reader.join()
        os.close(self._master)

    def end(self) -> int:
        """Read all there is to come; the exit status."""
        hung_up = self._left.is_set()
        while not hung_up and self._read():
            pass
        status = self.process.wait(PATIENCE)
        if not hung_up:
            self.hang_up()
        return status

    def kill(self) -> None:
        """End the program whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> bool:
        try:
            found = self._written.get(timeout=PATIENCE)
        except Empty:
            raise AssertionError(f"hangs:\n{self.seen()}") from None
        self.raw += found
        self._stream.feed(found)
        return bool(found)

    def seen(self) -> str:
        """What is on the screen and above it; a line that was wrapped is one again."""
        width = self.screen.columns
        rows = [
            *self.screen.history.top,
            *(self.screen.buffer[i] for i in range(self.screen.lines)),
        ]
        text = ""
        for row in rows:
            line = "".join(row[x].data for x in range(width)).rstrip()
            text += line if len(line) == width else f"{line}\n"
        return text.rstrip()


def python(script: str, **named: Any) -> Terminal:
    """A Python program on a terminal."""
    return Terminal([sys.executable, "-c", script], **named)


def mlx_grpo(*arguments: str, **named: Any) -> Terminal:
    """A command of ours on a terminal."""
    return Terminal([sys.executable, "-m", "mlx_grpo", *arguments], **named)
