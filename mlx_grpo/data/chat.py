"""Chat templates: conversations to token ids, and the tokenizer that does it."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_directory, time_limit
from mlx_grpo.core.types import FinishReason
from mlx_grpo.data.messages import Message
from mlx_grpo.data.template import Template
from mlx_grpo.data.template_bounds import bounded

QUESTION, ANSWER = "gravel", "tulip"
"""Words that no chat template holds."""
TURN = ({"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER})
LONGEST_RENDERING = 10.0
"""Seconds for one conversation; a template takes a millisecond."""
LONGEST_FRAME, LONGEST_SHARE = 100_000, 100
"""Characters a template may add, and how often it may repeat what was said."""


OWN_TEMPLATE = Template()


class TemplateRefusal(Exception):
    """A chat template raised, took too long, or wrote too much."""


def rendered(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    arguments: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The chat template applied to a conversation.

    Args:
        arguments: of the template, and no others; None for those of this project's prompts.
        tools: JSON schemas, for a template that knows tools.

    Raises:
        TemplateRefusal: with the reason on one line.
    """
    # mlx-lm's wrapper adds `enable_thinking` where nobody gives it
    plain = tokenizer if arguments is None else getattr(tokenizer, "_tokenizer", tokenizer)
    how: dict[str, Any] = {"enable_thinking": False} if arguments is None else dict(arguments)
    if tools:
        how["tools"] = list(tools)
    try:
        with time_limit(LONGEST_RENDERING), bounded():
            text = plain.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **how
            )
    except Exception as e:  # a template is a program from elsewhere, in its sandbox: anything
        raise TemplateRefusal(one_line(e)) from None
    given = sum(len(m["content"]) for m in messages)
    if len(text) > LONGEST_FRAME + LONGEST_SHARE * given:
        raise TemplateRefusal(f"it writes {len(text):,} characters for {given:,}")
    return str(text)


def prompt_tokens(
    place: str,
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, ...]:
    """The chat template applied to the conversation, with the opening of an answer.

    Args:
        tools: JSON schemas, for a template that knows tools.

    Raises:
        InputError: the template refuses the conversation, as Gemma's does with a system message, or
            leaves a message out.
    """
    return encoded(tokenizer, [prompt_text(place, tokenizer, messages, tools)])[0]


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


def prompt_text(
    place: str,
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """What `prompt_tokens` encodes.

    Raises:
        InputError: as there.
    """
    try:
        text = rendered(tokenizer, messages, add_generation_prompt=True, tools=tools)
    except TemplateRefusal as e:
        raise InputError(f"{place}: the chat template refuses this conversation: {e}") from None
    if (role := _left_out(messages, text)) is not None:
        raise InputError(
            f"{place}: the chat template leaves out the message of role '{role}'; give its text in "
            "a role that the template knows"
        )
    return text


def _left_out(messages: Sequence[Message], text: str) -> str | None:
    """The role of a message whose longest word is not in the text. Templates may trim and quote
    what they are given, and drop what an assistant thought in an earlier turn."""
    for message in messages:
        words = re.findall(r"\w+", message["content"])
        if message["role"] != "assistant" and max(words, key=len, default="") not in text:
            return str(message["role"])
    return None


def answer_tokens(
    tokenizer: Any, text: str, finish_reason: FinishReason = "stop", stop: int | None = None
) -> tuple[int, ...]:
    """Tokens of an answer as the policy would sample it, with a stop token unless cut off.

    Args:
        stop: what `end_of_turn` found, where many answers are to be closed.
    """
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if finish_reason != "stop":
        return ids
    return (*ids, end_of_turn(tokenizer) if stop is None else stop)


def end_of_turn(tokenizer: Any) -> int:
    """The token with which the chat template closes an answer, where there is one, else `eos`.

    Raises:
        InputError: the template refuses a question with an answer, or there is neither.
    """
    found = closing_token(tokenizer)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise InputError(
            "nothing ends an answer: the chat template closes it with no special token, and the "
            "tokenizer has no eos_token"
        )
    return int(found)


def closing_token(tokenizer: Any) -> int | None:
    """The special token with which the chat template closes an answer; None where it closes it with
    plain text, or not at all.

    Of what follows an answer at the end (Phi: `<|end|>`, `<|endoftext|>`) and what follows one that
    is answered in turn (`<|end|>`, `<|user|>`) the common beginning closes the turn.

    Raises:
        InputError: the template refuses a question with an answer.
    """
    last = _special(tokenizer, _closing_text(tokenizer))
    try:
        goes_on = rendered(tokenizer, [*TURN, {"role": "user", "content": QUESTION}])
    except TemplateRefusal:  # a template for one turn, which is its right
        goes_on = ""
    inside = _special(tokenizer, goes_on.rpartition(ANSWER)[2].partition(QUESTION)[0])
    common = [a for a, _ in takewhile(lambda p: p[0] == p[1], zip(last, inside, strict=False))]
    if common or last:
        return (common or last[:1])[-1]
    # nothing at the end: inside, the first of several closes; a single one opens the next turn
    closes = inside[:1] if len(inside) > 1 else [i for i in inside if i in tokenizer.eos_token_ids]
    return next((i for i in closes if i != tokenizer.bos_token_id), None)


def _closing_text(tokenizer: Any) -> str:
    """What the chat template writes behind the last answer."""
    try:
        return rendered(tokenizer, TURN).rpartition(ANSWER)[2]
    except TemplateRefusal as e:
        raise InputError(f"the chat template refuses a question with an answer: {e}") from None


def _special(tokenizer: Any, text: str) -> list[int]:
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return [i for i in tokenizer.encode(text, add_special_tokens=False) if i in special]


def stop_at_end_of_turn(tokenizer: Any) -> str | None:
    """Make what closes an answer a stop token; a line for the user if it was none, or cannot be.

    Without it an answer runs on into turns that the model makes up.
    """
    closing = closing_token(tokenizer)
    if closing in tokenizer.eos_token_ids:
        return None
    known = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))))
    if closing is None:
        text = _closing_text(tokenizer).strip()
        if not text:
            return None
        return (
            f"the chat template closes an answer with {text!r}, which is not one token here; "
            f"answers stop at {known or 'nothing'} only"
        )
    tokenizer.add_eos_token(str(closing))
    token = tokenizer.convert_ids_to_tokens(closing)
    return (
        f"the chat template closes an answer with {token}, which the configuration does not name "
        f"as a stop token (it names {known or 'none'}); answers stop there as well"
    )


def load_chat_tokenizer(path: Path, eos_token_ids: Any = None, date: str = "") -> Any:
    """As `read_chat_tokenizer`, and its chat template tried.

    Raises:
        InputError: damaged files, no chat template, or one that leaves out what is said.
    """
    tokenizer = read_chat_tokenizer(path, eos_token_ids, Template(date))
    check_template(path, tokenizer)
    return tokenizer


def read_chat_tokenizer(
    path: Path, eos_token_ids: Any = None, template: Template = OWN_TEMPLATE
) -> Any:
    """mlx-lm's wrapper of the tokenizer in `path`; its chat template is not run, so this may be
    called in any thread.

    Args:
        eos_token_ids: what ends an answer, where it is more than the tokenizer's own.
        template: what is changed about its chat template.

    Raises:
        InputError: damaged files, no chat template, or an argument that it does not read.
    """
    check_directory(path)
    text = template.text()
    # said outright: left open, transformers asks at the terminal whether to run what it finds
    options = {"trust_remote_code": False, **({} if text is None else {"chat_template": text})}
    try:
        tokenizer = load_tokenizer(path, options, eos_token_ids=eos_token_ids)
    except Exception as e:  # the tokenizers library raises plain exceptions for a damaged file
        raise InputError(f"{path}: cannot load the tokenizer: {one_line(e)}") from e
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{path}/tokenizer_config.json: no chat template; use an instruction-tuned model, or "
            "give one with --chat-template, or put it into chat_template.jinja beside it"
        )
    tokenizer.chat_template = template.applied(tokenizer.chat_template)
    return tokenizer


def check_template(path: Path, tokenizer: Any) -> None:
    """Raise InputError if the template passes over what is said: every prompt would be the same.

    In the main thread, as everything that runs a template: no other has a time limit.
    """
    roles = ("user", "assistant")
    for turns, (said, spare) in enumerate(zip(roles, ("a request", "an answer"), strict=True), 1):
        talks = [
            [{"role": role, "content": word if role == said else "?"} for role in roles]
            for word in ("tea", "rain")
        ]
        try:
            one, other = (rendered(tokenizer, talk[:turns]) for talk in talks)
        except TemplateRefusal:  # told with its prompt, if that is one it refuses
            continue
        if one == other:
            what = "is empty" if not one.strip() else f"leaves out the text of {spare}"
            raise InputError(f"{path}: its chat template {what}; give one that writes all messages")


def conversation_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    answer: str,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """A whole conversation, the answer closed, through the reward model's chat template.

    Args:
        arguments: of the template, and no others, as a model was trained with elsewhere; None for
            those of this project's prompts.

    Raises:
        InputError: the template refuses it, as Gemma's does with a system message.
    """
    whole = [*messages, {"role": "assistant", "content": answer}]
    try:
        text = rendered(tokenizer, whole, arguments=arguments)
    except TemplateRefusal as e:
        roles = ", ".join(m["role"] for m in whole)
        raise InputError(
            f"the reward model's chat template refuses a conversation of {roles}: {e}; change the "
            "prompts or the template"
        ) from None
    return tuple(tokenizer.encode(text, add_special_tokens=False))
