"""Conversations and chat templates: messages to token ids, and the tokenizer that does it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import FinishReason

ROLES = ("system", "user", "assistant")


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


def prompt_tokens(
    place: str, tokenizer: Any, messages: tuple[dict[str, str], ...]
) -> tuple[int, ...]:
    """The chat template applied to the conversation, with the opening of an answer.

    Raises:
        InputError: the template refuses the conversation, as Gemma's does with a system message.
    """
    return encoded(tokenizer, [prompt_text(place, tokenizer, messages)])[0]


def prompt_text(place: str, tokenizer: Any, messages: tuple[dict[str, str], ...]) -> str:
    """What `prompt_tokens` encodes.

    Raises:
        InputError: as there.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    except Exception as e:  # a template is a program from elsewhere, in its sandbox: anything
        raise InputError(f"{place}: the chat template refuses this conversation: {e}") from None
    return text


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of texts that a chat template has written; many at a time where the tokenizer is a
    fast one, which then works on all processors."""
    first = tuple(tokenizer.encode(texts[0], add_special_tokens=False))
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # the call above has set it to neither cut nor pad
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [tuple(e.ids) for e in found]
        if ids[0] == first:  # else its Python side does more than the fast one
            return ids
    return [first, *(tuple(tokenizer.encode(t, add_special_tokens=False)) for t in texts[1:])]


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
        text = tokenizer.apply_chat_template(whole, tokenize=False, enable_thinking=False)
    except Exception as e:  # as above
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
    try:
        tokenizer = load_tokenizer(path, eos_token_ids=eos_token_ids)
    except Exception as e:  # the tokenizers library raises plain exceptions for a damaged file
        raise InputError(f"{path}: cannot load the tokenizer: {one_line(e)}") from e
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{path}/tokenizer_config.json: no chat template; use an instruction-tuned model, or "
            "put one into chat_template.jinja beside it"
        )
    return tokenizer


def conversation_tokens(
    tokenizer: Any, messages: tuple[dict[str, str], ...], answer: str
) -> tuple[int, ...]:
    """A whole conversation, the answer closed, through the reward model's chat template.

    Raises:
        InputError: the template refuses it, as Gemma's does with a system message.
    """
    whole = [*messages, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(whole, tokenize=False, enable_thinking=False)
    except Exception as e:  # a template is a program from elsewhere, in its sandbox: anything
        roles = ", ".join(m["role"] for m in whole)
        raise InputError(
            f"the reward model's chat template refuses a conversation of {roles}: {e}; change the "
            "prompts or the template"
        ) from None
    return tuple(tokenizer.encode(text, add_special_tokens=False))
