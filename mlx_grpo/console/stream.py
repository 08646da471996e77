"""Standard output and standard error as they may turn out to be: a pipe that nobody reads any more,
a terminal that was closed, an encoding that lacks characters."""

import contextlib
import errno
import os
import sys
from io import TextIOWrapper
from typing import Literal, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
"""A pipe without a reader; a terminal that hung up; a stream that was closed."""
PLAINER = str.maketrans({"±": "+/-", "…": "...", "━": "=", "┄": "-"})
"""Our own characters for an encoding without them."""


class Stream:
    """Standard output or error, looked up at each call, for a test or a notebook may replace it.

    When its reader has gone, standard output raises BrokenPipeError unless `patient`, and is silent
    from then on; standard error goes on at the terminal the process was started from, or is silent.
    """

    def __init__(self, name: Literal["stdout", "stderr"], patient: bool = False):
        self.name = name
        self.patient = patient
        self.gone = False
        self._instead: TextIO | None = None

    @property
    def encoding(self) -> str:
        """The encoding of what is behind it."""
        return getattr(self._stream(), "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person sees it at once."""
        stream = self._stream()
        return stream is not None and stream.isatty()

    def fileno(self) -> int:
        """Number of the file behind it."""
        if (stream := self._stream()) is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return stream.fileno()

    def write(self, text: str) -> int:
        """Write what the encoding can express; the rest as escapes."""
        stream = self._stream()
        if stream is not None:
            try:
                stream.write(self._expressed(text))
            except (OSError, ValueError) as e:
                self._lost(stream, e)
                if self._instead:
                    return self.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand it to the operating system."""
        stream = self._stream()
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError) as e:
                self._lost(stream, e)

    def _stream(self) -> TextIO | None:
        if self.gone:
            return self._instead
        stream = getattr(sys, self.name)  # None where it was closed before the start
        return getattr(stream, "rich_proxied_file", stream)

    def _expressed(self, text: str) -> str:
        encoding = self.encoding
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            plainer = text.translate(PLAINER)
            return plainer.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _lost(self, stream: TextIO, reason: Exception) -> None:
        """Raise `reason` unless it means that nobody is there any more."""
        if isinstance(reason, OSError) and reason.errno not in GONE:
            raise reason
        first, self.gone, self._instead = not self.gone, True, None
        with contextlib.suppress(OSError, ValueError):  # what is buffered would fail again at exit
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        if self.name == "stderr" and first:
            with contextlib.suppress(OSError):
                tty = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)
                self._instead = os.fdopen(tty, "w", encoding="utf-8")
        elif self.name == "stdout" and not self.patient:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def bear_any_encoding() -> None:
    """Let standard output and error write what their encoding lacks as escapes, whoever prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
