"""Conversations of a rollout with environments: what a row's model said is parsed, the tools are
called, and what they answer becomes tokens that follow in the same row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stopping import SafePoint
from mlx_grpo.core.types import Completion, FinishReason, Observation, Outcome, Prompt
from mlx_grpo.data.chat import prompt_tokens
from mlx_grpo.data.messages import Message
from mlx_grpo.data.tools import Call, Tools, answered, calls_in, observation_tokens, told_of
from mlx_grpo.rewards.environments import Action, Environments

Path = tuple[str | int, ...]
"""(purpose, iteration, prompt, sample): which random numbers a row has."""


@dataclass(frozen=True)
class Acting:
    """What a rollout in turns needs beside the model."""

    environments: Environments
    tools: Tools
    max_iterations: int
    """Times that the calls of a completion are answered; 0 means any number."""


@dataclass
class Row:
    """One conversation."""

    prompt: Prompt
    path: Path
    turns: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    calls: int = 0
    failures: int = 0
    cut: bool = False
    """An observation did not fit, or was one too many."""
    start: int = 0
    """Where its present turn begins in its tokens."""

    @property
    def name(self) -> str:
        """Its environment's."""
        return "/".join(map(str, self.path))


class Conversations:
    """The rows of a wave, each with an environment of its own."""

    def __init__(
        self,
        acting: Acting,
        tokenizer: Any,
        stop_ids: frozenset[int],
        seed: int,
        safe_point: SafePoint,
    ):
        self._acting, self._tokenizer, self._stop_ids = acting, tokenizer, stop_ids
        self._seed, self._safe_point = seed, safe_point
        self._rows: list[Row] = []

    def open(self, prompts: Sequence[Prompt], paths: Sequence[Path]) -> list[Prompt]:
        """Reset an environment for each row; the prompts with what it says at the opening.

        Raises:
            InputError: `reset` fails, or opens the rows of one prompt differently.
        """
        k = len(paths) // len(prompts)
        self._rows = [Row(prompts[i // k], path) for i, path in enumerate(paths)]
        openings = self._acting.environments.reset(
            {r.name: (f"{self._seed}/{r.name}", _fields(r.prompt)) for r in self._rows},
            self._safe_point,
        )
        opened = []
        for i, prompt in enumerate(prompts):
            own = set(openings[i * k : (i + 1) * k])
            if len(own) > 1:
                raise InputError(
                    f"environment '{self._acting.environments.name}': reset opened prompt "
                    f"'{prompt.id}' in {len(own)} ways; completions are compared with each other, "
                    "so let its opening depend on the prompt's row alone"
                )
            opened.append(self._opened(prompt, own.pop()))
        for i, row in enumerate(self._rows):
            row.prompt = opened[i // k]
        return opened

    def _opened(self, prompt: Prompt, opening: str | None) -> Prompt:
        if not opening:
            return prompt
        *before, last = prompt.messages
        messages = (*before, {**last, "content": f"{last['content']}\n{opening}"})
        told, tools = told_of(self._acting.tools, messages), self._acting.tools
        schemas = tools.schemas if tools.native else ()
        ids = prompt_tokens(f"prompt '{prompt.id}'", self._tokenizer, told, schemas)
        return replace(prompt, messages=messages, token_ids=ids)

    def go_on(self, ended: Mapping[int, Sequence[int]], room: int) -> dict[int, tuple[int, ...]]:
        """Answer the rows whose turn has ended.

        Args:
            ended: all tokens of each row behind its prompt.
            room: tokens that a row may still get.

        Returns:
            The tokens of the observation for each row that goes on; the others are at their end.
        """
        asked: dict[int, list[Call | Observation]] = {}
        for i, ids in ended.items():
            row = self._rows[i]
            text = self._say(row, ids)
            found = calls_in(self._acting.tools, text)
            most = self._acting.max_iterations
            if found and most and row.answers >= most:
                row.cut, found = True, []
            if found:
                asked[i] = found
        observed = self._call(asked)
        going: dict[int, tuple[int, ...]] = {}
        for i, observations in observed.items():
            messages, tokens = self._observe(self._rows[i], observations, ended[i])
            if len(tokens) < room:
                going[i] = tokens
                self._rows[i].turns += messages
                self._rows[i].start = len(ended[i]) + len(tokens)
            else:
                self._rows[i].cut = True
        return going

    def _say(self, row: Row, ids: Sequence[int]) -> str:
        said = list(ids[row.start :])
        text = str(self._tokenizer.decode(said[:-1] if said[-1] in self._stop_ids else said))
        row.turns.append({"role": "assistant", "content": text})
        return text

    def _call(self, asked: Mapping[int, list[Call | Observation]]) -> dict[int, list[Observation]]:
        """What came of each row's calls: those that are well formed go out in one request."""
        actions = [
            Action(self._rows[i].name, c.name, c.arguments)
            for i, found in asked.items()
            for c in found
            if isinstance(c, Call)
        ]
        results = iter(self._acting.environments.call(actions, self._safe_point))
        return {
            i: [next(results) if isinstance(c, Call) else c for c in found]
            for i, found in asked.items()
        }

    def _observe(
        self, row: Row, observations: Sequence[Observation], ids: Sequence[int]
    ) -> tuple[list[Message], tuple[int, ...]]:
        tools = self._acting.tools
        row.calls += len(observations)
        row.failures += sum(o.failed for o in observations)
        row.answers += 1
        history = [*told_of(tools, row.prompt.messages), *row.turns[:-1]]
        messages = answered(tools, observations)
        closing = str(self._tokenizer.decode([ids[-1]]))
        return messages, observation_tokens(self._tokenizer, tools, history, messages, closing)

    def close(self, drawn: Sequence[tuple[list[int], list[float], list[bool]]]) -> list[Completion]:
        """The completions, each with what its environment leaves."""
        names = [row.name for row in self._rows]
        outcomes = self._acting.environments.finish(names, self._safe_point)
        return [
            self._completion(row, *tokens, outcome)
            for row, tokens, outcome in zip(self._rows, drawn, outcomes, strict=True)
        ]

    def _completion(
        self, row: Row, ids: list[int], logps: list[float], said: list[bool], outcome: Outcome
    ) -> Completion:
        stopped = ids[-1] in self._stop_ids
        if not stopped:
            self._say(row, ids)
        reason: FinishReason = "stop" if stopped and not row.cut else "length"
        text = self._tokenizer.decode(ids[:-1] if stopped else ids)
        mask = tuple(said)
        turns = tuple(row.turns)
        return Completion(
            tuple(ids), text, reason, tuple(logps), mask, turns, row.calls, row.failures, outcome
        )


def _fields(prompt: Prompt) -> dict[str, Any]:
    """What `reset` is called with."""
    return {
        **prompt.fields,
        "id": prompt.id,
        "response": prompt.response,
        "prompt": prompt.messages[-1]["content"],
    }
