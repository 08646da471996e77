"""The trainer's end of environments: objects of a user's class in a process of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Observation, Outcome
from mlx_grpo.rewards import environment_worker
from mlx_grpo.rewards.process import RewardProcess, no_relay
from mlx_grpo.rewards.worker import RewardError

MEMORY = 4 << 30
"""Bytes of address space that the process may take beside what Python itself maps."""


@dataclass(frozen=True)
class Action:
    """A tool called by the model in one row."""

    row: str
    name: str
    arguments: dict[str, Any]


class Environments:
    """Environments by row. They end with `close`, or when the trainer dies."""

    def __init__(self, spec: str, timeout: float, relay: Callable[[str], None] = no_relay):
        """Start the process and load the class.

        Args:
            spec: `module:Class` or `path/file.py:Class`.
            timeout: seconds that one call may take.
            relay: told each line that the class prints.

        Raises:
            InputError: no such class, it has no `reset`, or a tool lacks types or a docstring.
        """
        self.name, self.timeout = spec.rpartition(":")[2], timeout
        self._process = RewardProcess(
            spec,
            timeout,
            relay,
            (environment_worker.__file__, str(MEMORY)),
            "environment",
            "--tool-timeout",
        )
        self.file = self._process.file
        self.tools: list[dict[str, Any]] = self._process.loaded["tools"]
        """JSON schemas."""
        self.rewards: bool = self._process.loaded["rewards"]
        """Whether the class has a `reward` method."""

    def reset(
        self, rows: Mapping[str, tuple[str, dict[str, Any]]], safe_point: SafePoint = never_stop
    ) -> list[str | None]:
        """Make a new environment for each row; the opening of each.

        Args:
            rows: (seed of its random numbers, fields of its prompt's row) by row.

        Raises:
            InputError: `reset` raises, or takes longer than the timeout.
        """
        actions = [
            {"row": row, "do": "reset", "seed": seed, "arguments": fields}
            for row, (seed, fields) in rows.items()
        ]
        return [r["text"] for r in self._do(actions, safe_point)]

    def call(
        self, calls: Sequence[Action], safe_point: SafePoint = never_stop
    ) -> list[Observation]:
        """What each tool answers, one after the other; a tool that raises, hangs or answers too
        much is a failed observation."""
        actions = [
            {"row": c.row, "do": "call", "name": c.name, "arguments": c.arguments} for c in calls
        ]
        return [
            Observation(r["failure"], True) if "failure" in r else Observation(r["text"])
            for r in self._do(actions, safe_point)
        ]

    def finish(self, rows: Sequence[str], safe_point: SafePoint = never_stop) -> list[Outcome]:
        """The reward and the public attributes of each row's environment, which ends here.

        Raises:
            InputError: `reward` raises or returns no number.
        """
        found = self._do([{"row": row, "do": "finish"} for row in rows], safe_point)
        return [Outcome(r["reward"], r["state"]) for r in found]

    def _do(self, actions: Sequence[dict[str, Any]], safe_point: SafePoint) -> list[dict[str, Any]]:
        if not actions:
            return []
        allowed = self.timeout * (len(actions) + 1)
        try:
            reply = self._process.ask({"actions": list(actions)}, allowed, safe_point)
        except RewardError as e:
            raise InputError(f"environment '{self.name}' failed: {e}") from e
        found = reply.get("results")
        if not isinstance(found, list) or len(found) != len(actions):
            self.close()
            raise InputError(
                f"environment '{self.name}': its process did not answer with {len(actions)} results"
            )
        return found

    def close(self) -> None:
        """End the process and all environments in it."""
        self._process.close()
