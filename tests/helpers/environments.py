"""Environments for tests: one that counts, one without tools, and broken ones."""

import random
import signal
import time


class Counter:
    """Adds up what the model gives it."""

    def __init__(self) -> None:
        self.total = 0

    def reset(self, **row: object) -> None:
        self.total = 0

    def add(self, number: int) -> str:
        """Add a number.

        Args:
            number: to add.
        """
        self.total += number
        return f"total {self.total}"

    def draw(self) -> str:
        """Draw a random number."""
        return str(random.random())

    def fail(self) -> str:
        """Raise an error."""
        raise ValueError("it fails")

    def hang(self) -> str:
        """Never answer."""
        while True:
            time.sleep(0.01)

    def flood(self) -> str:
        """Answer too much."""
        return "x" * 1_000_000

    def swell(self) -> str:
        """Take too much memory."""
        return str(len(bytearray(1 << 40)))

    def reward(self) -> float:
        return float(self.total)


class Adder:
    """Adds up what the model gives it, and a random number."""

    def reset(self, **row: object) -> None:
        self.total = random.randint(0, 9)

    def add(self, number: int) -> str:
        """Add.

        Args:
            number: it
        """
        self.total += number + random.randint(0, 9)
        return str(self.total)

    def reward(self) -> float:
        return float(self.total % 10)


def as_in_trl(prompts: list[str], environments: list[Adder], **_: object) -> list[float]:
    """Reads the environments as a reward function of TRL does."""
    return [2.0 * (e.total % 10) for e in environments]


class OneTurn:
    """No tools: the model answers, and that is all."""

    def reset(self, **row: object) -> None:
        pass


class Greeting(Counter):
    """Opens with a text of its own."""

    def reset(self, **row: object) -> str:  # type: ignore[override]
        return f"hello {row['id']}"


class Unsettled(Counter):
    """Opens each row differently."""

    def reset(self, **row: object) -> str:  # type: ignore[override]
        return str(random.random())


class BreaksAtReset(Counter):
    def reset(self, **row: object) -> None:
        raise RuntimeError("no dice")


class Deaf(Counter):
    def reset(self, **row: object) -> None:
        """As a call into C that never returns to the interpreter, where no signal is answered."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)


class Untyped:
    def reset(self) -> None:
        pass

    def tool(self, x):  # type: ignore[no-untyped-def]
        return "no types, no docstring"
