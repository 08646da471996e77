"""An environment: find a number by guessing, with hints.

    mlx-grpo train --config examples/number_game.toml

See docs/environments.md. The class needs nothing of mlx_grpo.
"""

from types import SimpleNamespace


class NumberGame:
    """One game: the secret number is in the prompt's row."""

    def __init__(self) -> None:
        self.guesses: list[int] = []
        self.found = False

    def reset(self, secret: int, low: int, high: int) -> None:
        self._secret, self._low, self._high = secret, low, high

    def guess(self, number: int) -> str:
        """
        Guess the secret number.

        Args:
            number: the guess
        """
        number = int(number)
        self.guesses.append(number)
        if number == self._secret:
            self.found = True
            return "correct, the game is over"
        return "the secret is higher" if number < self._secret else "the secret is lower"

    def reward(self) -> float:
        """1 for the secret, less 0.02 for each guess; else up to 0.5 for guesses that used the
        hints, and 0.1 for any guess at all."""
        if not self.guesses:
            return 0.0
        if self.found:
            return 1.0 - 0.02 * len(self.guesses)
        nearest = min(abs(g - self._secret) for g in self.guesses)
        return 0.1 + 0.4 * max(0.0, 1 - nearest / (self._high - self._low))


def found(environments: list[SimpleNamespace]) -> list[float]:
    """1 where the secret was found: a figure to watch."""
    return [float(e.found) for e in environments]
