"""A talk with the SFT model and a run's adapter side by side, through mlx-lm's own generation.

Both are asked as the run asks them (chat template, system message, temperature) and draw with the
same random numbers, so that what differs between two answers comes from the adapter.
"""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate

from mlx_grpo.config.settings import with_settings
from mlx_grpo.console.asking import ask, at_a_terminal
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.core.stopping import StopRequested, never_stop, stop_signals
from mlx_grpo.data.chat import prompt_tokens
from mlx_grpo.data.messages import Message
from mlx_grpo.data.prompts import PromptRow
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.directory import check_length
from mlx_grpo.models.lora import load_adapter
from mlx_grpo.plan.planner import planner_for
from mlx_grpo.run.directory import chosen_adapter, other_model, run_settings
from mlx_grpo.training.setup import load_models, training_rows

NEW = "/new"
"""What begins the conversation anew."""


@dataclass(frozen=True)
class Side:
    """One of the two who answer, and what was said with it so far."""

    label: str
    model: nn.Module
    said: tuple[Message, ...]


@dataclass(frozen=True)
class Chat:
    """What answers need besides the question."""

    backbone: Backbone
    sides: tuple[Side, Side]
    temperature: float
    most: int
    """Tokens of an answer at the most."""
    seed: int


def open_chat(
    run: Path, adapter: str, ui: Console, temperature: float | None = None, most: int = 0
) -> Chat:
    """Load the SFT model and an adapter of a run: `best`, `final`, or "" for best if there.

    Args:
        temperature: None: the run's.
        most: tokens of an answer at the most; 0: the run's.

    Raises:
        InputError: no run, no such adapter, or its model is gone.
    """
    config = run_settings(run)
    directory = chosen_adapter(run, adapter)
    # only the policy is asked, so that the rewards may be gone
    alone = with_settings(config, rm_model="none", reward=(), reward_weights=())
    with ui.working("loading"):
        backbone = load_models(alone, planner_for(alone).plan()).backbone
        adapted = load_adapter(backbone.model, directory)
    if backbone.note:
        ui.warn(backbone.note)
    if changed := other_model(run, backbone.path):
        ui.warn(changed)
    if config.rollout.environment:
        ui.warn(
            f"{run}: its environment, '{config.rollout.environment}', takes no part in a chat; "
            "tools are neither described nor called"
        )
    try:
        opening = system_message(training_rows(config))
    except InputError as e:
        ui.warn(f"cannot look for a system message among the prompts: {e}")
        opening = ()
    sides = (
        Side("SFT model", backbone.model, opening),
        Side(f"after GRPO ({directory.name})", adapted, opening),
    )
    rollout = config.rollout
    chosen = rollout.temperature if temperature is None else temperature
    return Chat(backbone, sides, chosen, most or rollout.max_completion_length, config.run.seed)


def system_message(rows: list[PromptRow]) -> tuple[Message, ...]:
    """The system message that all prompts of a run begin with; none where they differ."""
    firsts = [row.messages[0] for row in rows]
    same = all(first == firsts[0] for first in firsts)
    return (firsts[0],) if same and firsts[0]["role"] == "system" else ()


def answer(chat: Chat, side: Side, question: str, turn: int) -> Iterator[str]:
    """The pieces of an answer as they are sampled.

    Args:
        turn: number of the question; with the seed it decides what is drawn.

    Raises:
        InputError: the chat template refuses the conversation, or it has become too long.
    """
    asked = (*side.said, {"role": "user", "content": question})
    tokens = prompt_tokens("the conversation", chat.backbone.tokenizer, asked)
    check_length(chat.backbone.path, chat.backbone.config, len(tokens) + chat.most)
    position = count()

    def draw(logprobs: mx.array) -> mx.array:
        if not chat.temperature:
            return mx.argmax(logprobs, axis=-1)
        drawn = key(chat.seed, "chat", turn, next(position))
        return mx.random.categorical(logprobs.astype(mx.float32) / chat.temperature, key=drawn)

    pieces: Any = stream_generate(
        side.model, chat.backbone.tokenizer, list(tokens), max_tokens=chat.most, sampler=draw
    )
    for piece in pieces:
        yield piece.text


def hold(chat: Chat, ui: Console) -> None:
    """Ask for questions until there are no more: at a terminal a conversation, of a pipe a line
    each, all on their own.

    Ctrl-C stops an answer, and what was said in that turn is forgotten; a second one, or one where
    nothing is being answered, ends the talk, as Ctrl-D does.
    """
    talking, sides = at_a_terminal(), chat.sides
    if talking:
        ui.say(f"Ctrl-C stops an answer, {NEW} begins anew, Ctrl-D ends.")
    for turn in count():
        if (question := ask("> ")) is None:
            if talking:
                ui.say("")  # the shell's own line begins below
            return
        if not question.strip():
            continue
        if question.strip() == NEW:
            sides = chat.sides
            continue
        try:
            after = _answered(chat, sides, question, turn, ui, "" if talking else question)
        except InputError as e:
            if not talking:
                raise
            ui.error(f"{e}; type {NEW} to begin anew")
            continue
        sides = after if talking else sides


def _answered(
    chat: Chat, sides: tuple[Side, Side], question: str, turn: int, ui: Console, title: str
) -> tuple[Side, Side]:
    """The sides after both have answered, or as they were where that was interrupted."""
    first, second = sides
    stopping = (
        stop_signals(signals=(signal.SIGINT,)) if at_a_terminal() else nullcontext(never_stop)
    )
    try:
        with stopping as safe_point, ui.growing(title, [side.label for side in sides]) as texts:
            for place, side in enumerate(sides):
                for piece in answer(chat, side, question, turn):
                    texts[place] += piece
                    safe_point()
    except StopRequested:
        return sides
    return _with(first, question, texts[0]), _with(second, question, texts[1])


def _with(side: Side, question: str, text: str) -> Side:
    turn = ({"role": "user", "content": question}, {"role": "assistant", "content": text})
    return replace(side, said=(*side.said, *turn))
