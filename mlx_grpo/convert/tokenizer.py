"""The tokenizer of a source: its files copied as they are, and checked before they are used."""

import shutil
from pathlib import Path

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import TemplateRefusal, load_chat_tokenizer, rendered
from mlx_grpo.files.atomic import read_json

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
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files.

    Raises:
        InputError: there is no tokenizer_config.json, or one of them is no JSON.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_json(source / name)  # mlx-lm passes over a damaged generation_config.json
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer_config.json").is_file():
        raise InputError(f"{source}: tokenizer_config.json is missing")


def check_tokenizer(directory: Path, rows: int) -> None:
    """Load the tokenizer in `directory` and compare it with the embedding.

    Args:
        rows: how many tokens the model embeds.

    Raises:
        InputError: it cannot be loaded, has no chat template, or knows tokens the model does not.
    """
    tokenizer = load_chat_tokenizer(directory)
    try:
        rendered(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    except TemplateRefusal as e:
        raise InputError(f"{directory}: the chat template cannot be applied: {e}") from e
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise InputError(
            f"{directory}/tokenizer.json: token {token!r} is number {highest}, the model embeds "
            f"{rows}; this is another model's tokenizer"
        )
