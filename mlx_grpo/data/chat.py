"""Conversations and chat templates: messages to token ids, and the tokenizer that does it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_directory, time_limit
from mlx_grpo.core.types import FinishReason

ROLES = ("system", "user", "assistant")
LONGEST_RENDERING = 10.0
"""Seconds for one conversation; a template takes a millisecond."""
LONGEST_FRAME, LONGEST_SHARE = 100_000, 100
"""Characters a template may add, and how often it may repeat what was said."""


def row_messages(place: str, row: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The conversation of a row: its `messages`, or its `prompt` as one user message."""
    if "prompt" in row and "messages" in row:
        raise InputError(f"{place}: has both 'prompt' and 'messages'; keep one")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise InputError(f"{place}: field 'prompt' must be a text that is not empty")
        return ({"role": "user", "content": row["prompt"]},)
    messages = row.get("messages")
    if messages is None:
        raise InputError(f"{place}: field 'prompt' is missing (or 'messages')")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: field 'messages' must be a list that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(
                f"{place}: field 'messages[{i}].role' must be one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise InputError(
                f"{place}: field 'messages[{i}].content' must be a text that is not empty"
            )
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{place}: field 'messages' ends with the assistant; the last message must ask"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


class TemplateRefusal(Exception):
    """A chat template raised, took too long, or wrote too much."""


def rendered(
    tokenizer: Any, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """The chat template applied to a conversation.

    Raises:
        TemplateRefusal: with the reason on one line.
    """
    try:
        with time_limit(LONGEST_RENDERING):
            text = tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                enable_thinking=False,
            )
    except Exception as e:  # a template is a program from elsewhere, in its sandbox: anything
        raise TemplateRefusal(one_line(e)) from None
    given = sum(len(m["content"]) for m in messages)
    if len(text) > LONGEST_FRAME + LONGEST_SHARE * given:
        raise TemplateRefusal(f"it writes {len(text):,} characters for {given:,}")
    return str(text)


def prompt_tokens(
    place: str, tokenizer: Any, messages: tuple[dict[str, str], ...]
) -> tuple[int, ...]:
    """The chat template applied to the conversation, with the opening of an answer.

    Raises:
        InputError: the template refuses the conversation, as Gemma's does with a system message.
    """
    try:
        text = rendered(tokenizer, messages, add_generation_prompt=True)
    except TemplateRefusal as e:
        raise InputError(f"{place}: the chat template refuses this conversation: {e}") from None
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def answer_tokens(
    tokenizer: Any, text: str, finish_reason: FinishReason = "stop"
) -> tuple[int, ...]:
    """Tokens of an answer as the policy would sample it, with a stop token unless cut off."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return (*ids, end_of_turn(tokenizer)) if finish_reason == "stop" else ids


def end_of_turn(tokenizer: Any) -> int:
    """The stop token with which the chat template closes an answer; Gemma's is not its `eos`.

    Raises:
        InputError: the template refuses a question with an answer.
    """
    whole = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:
        text = rendered(tokenizer, whole)
    except TemplateRefusal as e:
        raise InputError(f"the chat template refuses a question with an answer: {e}") from None
    ids = tokenizer.encode(text, add_special_tokens=False)
    closing = [i for i in ids if i in tokenizer.eos_token_ids]
    return int(closing[-1] if closing else tokenizer.eos_token_id)


def load_chat_tokenizer(path: Path, eos_token_ids: Any = None) -> Any:
    """mlx-lm's wrapper of the tokenizer in `path`.

    Args:
        eos_token_ids: what ends an answer, where it is more than the tokenizer's own.

    Raises:
        InputError: damaged files, or no chat template.
    """
    check_directory(path)
    try:
        # said outright: left open, transformers asks at the terminal whether to run what it finds
        no_code = {"trust_remote_code": False}
        tokenizer = load_tokenizer(path, no_code, eos_token_ids=eos_token_ids)
    except Exception as e:  # the tokenizers library raises plain exceptions for a damaged file
        raise InputError(f"{path}: cannot load the tokenizer: {one_line(e)}") from e
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{path}/tokenizer_config.json: no chat template; use an instruction-tuned model, or "
            "put one into chat_template.jinja beside it"
        )
    _check_template(path, tokenizer)
    return tokenizer


def _check_template(path: Path, tokenizer: Any) -> None:
    """Raise InputError if the template passes over what is said: every prompt would be the same."""
    for said, spare in (("user", "a request"), ("assistant", "an answer")):
        talks = [
            [{"role": role, "content": word if role == said else "?"} for role in ROLES[1:]]
            for word in ("tea", "rain")
        ]
        try:
            one, other = (rendered(tokenizer, talk[: ROLES.index(said)]) for talk in talks)
        except TemplateRefusal:  # told with its prompt, if that is one it refuses
            continue
        if one == other:
            what = "is empty" if not one.strip() else f"leaves out the text of {spare}"
            raise InputError(f"{path}: its chat template {what}; give one that writes all messages")


def conversation_tokens(
    tokenizer: Any, messages: tuple[dict[str, str], ...], answer: str
) -> tuple[int, ...]:
    """A whole conversation, the answer closed, through the reward model's chat template.

    Raises:
        InputError: the template refuses it, as Gemma's does with a system message.
    """
    whole = [*messages, {"role": "assistant", "content": answer}]
    try:
        text = rendered(tokenizer, whole)
    except TemplateRefusal as e:
        roles = ", ".join(m["role"] for m in whole)
        raise InputError(
            f"the reward model's chat template refuses a conversation of {roles}: {e}; change the "
            "prompts or the template"
        ) from None
    return tuple(tokenizer.encode(text, add_special_tokens=False))
