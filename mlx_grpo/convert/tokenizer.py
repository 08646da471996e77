"""The tokenizer of a source: its files copied as they are, and checked before they are used."""

import shutil
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import TemplateRefusal, load_chat_tokenizer, rendered
from mlx_grpo.files.atomic import read_json, write_json

STOPS = "generation_config.json"
"""Holds the stop tokens; an adapter has none."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    STOPS,
)


def copy_tokenizer(source: Path, target: Path, base: Path | None = None) -> None:
    """Copy the tokenizer's files.

    Args:
        base: of an adapter; the stop tokens are its where `source` says nothing of them.

    Raises:
        InputError: there is no tokenizer_config.json, or one of them is no JSON.
    """
    for name in TOKENIZER_FILES:
        file = source / name
        if name == STOPS and base and not file.is_file():
            file = base / name
        if file.is_file():
            if name.endswith(".json"):
                read_json(file)  # mlx-lm passes over a damaged generation_config.json
            shutil.copyfile(file, target / name)
    if not (target / "tokenizer_config.json").is_file():
        raise InputError(f"{source}: tokenizer_config.json is missing")


def check_tokenizer(directory: Path, rows: int) -> tuple[str, ...]:
    """Load the tokenizer in `directory` and compare it with the embedding.

    A padding token that was added behind the embedding is never embedded; it is taken out, since a
    text that spells it would be.

    Args:
        rows: how many tokens the model embeds.

    Returns:
        what was changed, a line each.

    Raises:
        InputError: it cannot be loaded, has no chat template, or knows tokens the model does not.
    """
    tokenizer = load_chat_tokenizer(directory)
    try:
        rendered(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    except TemplateRefusal as e:
        raise InputError(f"{directory}: the chat template cannot be applied: {e}") from e
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not beyond:
        return ()
    highest, token = beyond[-1]
    if [token] != [tokenizer.pad_token] or len(beyond) > 1 or not _added(directory, token):
        raise InputError(
            f"{directory}/tokenizer.json: token {token!r} is number {highest}, the model embeds "
            f"{rows}; this is another model's tokenizer, or the model was not saved after "
            "resize_token_embeddings"
        )
    _without_token(directory, token, str(tokenizer.eos_token))
    load_chat_tokenizer(directory)
    return (
        f"the padding token {token!r} is number {highest} and the model embeds {rows} tokens; it "
        f"was removed from the tokenizer, and {tokenizer.eos_token!r} pads in its place",
    )


def _added(directory: Path, token: str) -> bool:
    """Whether a token was added to the vocabulary, by a tokenizer in one file."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return False
    about = read_json(file)
    names = [t.get("content") for t in about.get("added_tokens") or []]
    return token in names and token not in ((about.get("model") or {}).get("vocab") or {})


def _without_token(directory: Path, token: str, padding: str) -> None:
    """Take an added token out of a tokenizer's files; another one pads."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            about = read_json(directory / name)
            write_json(directory / name, _cleaned(about, token, padding))
    (directory / "added_tokens.json").unlink(missing_ok=True)


def _cleaned(about: dict[str, Any], token: str, padding: str) -> dict[str, Any]:
    named = about.get("pad_token")
    if (named.get("content") if isinstance(named, dict) else named) == token:
        about = {**about, "pad_token": padding}
    if isinstance(about.get("added_tokens"), list):
        kept = [t for t in about["added_tokens"] if t.get("content") != token]
        about = {**about, "added_tokens": kept, "padding": None}
    if isinstance(decoder := about.get("added_tokens_decoder"), dict):
        rest = {i: t for i, t in decoder.items() if t.get("content") != token}
        about = {**about, "added_tokens_decoder": rest}
    for field in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(more := about.get(field), list):
            about = {**about, field: [t for t in more if t != token]}
    return about
