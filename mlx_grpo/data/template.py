"""What a run changes about its model's chat template: the date, arguments, the template itself.

Date and arguments are written into the head of the template, so that everything that runs it sees
the same, within the same bounds (`template_bounds.py`).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.limits import read_bounded
from mlx_grpo.data.clock import pinned

LARGEST = 1 << 20
"""Bytes of a template; the longest known ones take some ten thousand."""
TAKEN = ("messages", "add_generation_prompt", "continue_final_message", "tokenize", "strftime_now")
"""Names that a template is given by what runs it."""


@dataclass(frozen=True)
class Template:
    """As the settings of the same names say; all empty means the model's own template."""

    date: str = ""
    file: str = ""
    kwargs: str = ""
    """A JSON object."""

    def text(self) -> str | None:
        """The template in `file`; None where there is none to read.

        Raises:
            InputError: no such file, too large a one, or none in UTF-8.
        """
        if not self.file:
            return None
        try:
            return read_bounded(Path(self.file), LARGEST).decode("utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"--chat-template {self.file}: no such file") from None
        except UnicodeDecodeError:
            raise InputError(f"--chat-template {self.file}: not a text in UTF-8") from None

    def applied(self, template: Any) -> Any:
        """A tokenizer's chat template, or several by name, with date and arguments at its head.

        Raises:
            InputError: an argument that the template does not read.
        """
        template = pinned(template, self.date) if self.date else template
        return with_arguments(template, json.loads(self.kwargs)) if self.kwargs else template


def with_arguments(template: Any, arguments: dict[str, Any]) -> Any:
    """A chat template, or several by name, that sees these arguments whatever it is called with.

    Raises:
        InputError: an argument that it does not read, or that is not the user's to give.
    """
    if isinstance(template, dict):
        return {name: with_arguments(text, arguments) for name, text in template.items()}
    for name in arguments:
        if not name.isidentifier() or name in TAKEN:
            raise InputError(f"--chat-template-kwargs: {name!r} is no argument of a chat template")
        if not isinstance(template, str) or not re.search(rf"\b{name}\b", template):
            raise InputError(
                f"--chat-template-kwargs: the chat template does not read {name!r}, so it would "
                "change nothing; correct the name, or leave it out"
            )
    # Python's literals are Jinja's too; each line break belongs to the block before it
    return "".join(f"{{% set {n} = {v!r} %}}\n" for n, v in arguments.items()) + template
