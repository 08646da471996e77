"""What ranks tell each other of their shares of a batch."""

from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from mlx_grpo.core.types import Completion, Group, Outcome, Prompt
from mlx_grpo.distributed.ranks import Ranks

Rewards = tuple[list[list[float]], dict[str, list[float | None]]]
"""(raw rewards [P][K], each source's own scores, flat)."""


def all_groups(ranks: Ranks, mine: Sequence[Group], prompts: Sequence[Prompt]) -> list[Group]:
    """The groups of all prompts, from those of each rank's share."""
    if ranks.size == 1:
        return list(mine)
    answers = ranks.merged(
        [(g.prompt.messages, g.prompt.token_ids, [astuple(c) for c in g.completions]) for g in mine]
    )
    return [
        Group(
            # an environment may have added to what the file says
            replace(prompt, messages=tuple(messages), token_ids=tuple(ids)),
            tuple(_completion(*row) for row in rows),
        )
        for prompt, (messages, ids, rows) in zip(prompts, answers, strict=True)
    ]


def _completion(
    ids: list[int],
    text: str,
    reason: Any,
    logps: list[float],
    by_model: list[bool],
    turns: list[dict[str, Any]],
    calls: int,
    failures: int,
    outcome: list[Any],
) -> Completion:
    said, left = tuple(by_model), Outcome(*outcome)
    messages = tuple(turns)
    return Completion(tuple(ids), text, reason, tuple(logps), said, messages, calls, failures, left)


def all_rewards(ranks: Ranks, mine: Rewards, k: int) -> Rewards:
    """The rewards of all groups of K answers, from those of each rank's share."""
    if ranks.size == 1:
        return mine
    raw, sources = mine
    each = [
        (raw_K, {name: scores[i * k : (i + 1) * k] for name, scores in sources.items()})
        for i, raw_K in enumerate(raw)
    ]
    rows = ranks.merged(each)
    by_source = {name: [s for _, scores in rows for s in scores[name]] for name in rows[0][1]}
    return [raw_K for raw_K, _ in rows], by_source
