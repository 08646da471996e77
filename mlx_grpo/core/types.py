"""What the stages hand to each other: frozen dataclasses without logic.

Axes: P prompts, K completions per prompt, T tokens. Groups differ in length, so token arrays are
per group, [K, T], padded on the right; `mask_KT` is 1 on real completion tokens.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

FinishReason = Literal["stop", "length"]
TokenIds = tuple[int, ...]
Parameters = dict[str, mx.array]
"""Arrays by full name, as `model.layers.0.mlp.up_proj.lora_a`."""


@dataclass(frozen=True)
class Prompt:
    """One row of a prompts file."""

    id: str
    messages: tuple[dict[str, Any], ...]
    token_ids: tuple[int, ...]
    """The chat template applied to `messages`, generation prompt included."""
    response: str | None = None
    """Reference answer, where the file has one."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The row's other fields, passed to reward functions."""


@dataclass(frozen=True)
class Observation:
    """What a tool answered."""

    text: str
    failed: bool = False
    """The call was malformed, or the tool raised, hung or answered too much."""


@dataclass(frozen=True)
class Outcome:
    """What an environment leaves."""

    reward: float | None = None
    """Of its own `reward` method, where it has one."""
    state: dict[str, Any] = field(default_factory=dict)
    """Its public attributes that JSON can hold."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer; with an environment, several turns with observations between them."""

    token_ids: tuple[int, ...]
    """Sampled tokens, the stop token included."""
    text: str
    """Decoded without the stop token."""
    finish_reason: FinishReason
    logps: tuple[float, ...]
    """Log-prob of each token as the sampler saw it, at the sampling temperature; zero for
    observations."""
    by_model: tuple[bool, ...] = ()
    """Whether each token was sampled, or is of an observation; empty means that all were."""
    turns: tuple[dict[str, Any], ...] = ()
    """Messages behind the prompt; empty without an environment."""
    calls: int = 0
    """Tool calls."""
    failures: int = 0
    """Those that failed."""
    outcome: Outcome = Outcome()
    """Of its environment."""

    @property
    def model_tokens(self) -> int:
        """Tokens that the model said."""
        return sum(self.by_model) if self.by_model else len(self.token_ids)


@dataclass(frozen=True)
class Group:
    """K answers to one prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class TrainingGroup:
    """Completions of a group that the update learns from, with their advantages."""

    position: int
    """Which of the iteration's groups."""
    prompt_ids: tuple[int, ...]
    tokens_KT: mx.array
    mask_KT: mx.array
    sampled_logp_KT: mx.array
    """Log-probs as the sampler saw them."""
    advantages_K: mx.array
    left_out: int = 0
    """Completions that are not here but count where the loss is a mean over completions."""


@dataclass(frozen=True)
class PreferencePair:
    """One row of a preference file, tokenized."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    split: str = ""
    """`train`, `valid` or `test`, where the file says so."""
