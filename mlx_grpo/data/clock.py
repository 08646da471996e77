"""Chat templates that read the clock: the date is pinned, so that a prompt is the same tomorrow.

transformers gives every template a function `strftime_now`. A macro of that name at the head of the
template takes its place, whatever format the template asks for.
"""

import datetime
from typing import Any

CLOCK = "strftime_now"
CODES = "aAbBcdeDfFgGhHIjklmMnpPrRsSTtuUVwWxXyYzZ"
"""Format codes of strftime; each is also known with a `-` (no padding) before it."""


def pinned(template: Any, date: str) -> Any:
    """A chat template, or several by name, in which it is always midnight at the start of `date`.

    Templates that do not read the clock come back as they are.
    """
    if isinstance(template, dict):
        return {name: pinned(text, date) for name, text in template.items()}
    if not isinstance(template, str) or CLOCK not in template:
        return template
    midnight = datetime.datetime.fromisoformat(date)
    shown = [(f"%{dash}{c}", midnight.strftime(f"%{dash}{c}")) for dash in ("-", "") for c in CODES]
    calls = "".join(f".replace({code!r}, {text!r})" for code, text in [*shown, ("%%", "%")])
    # the line break belongs to the block, and leaves the template at the start of a line
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{calls} }}}}{{% endmacro %}}\n{template}"
