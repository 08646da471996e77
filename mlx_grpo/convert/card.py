"""The model card of a converted directory: what it is, where it comes from, what it cost."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mlx_grpo.convert.reader import OpenedSource
from mlx_grpo.convert.source import FINETUNE, Source

USE_SFT = """```
mlx-grpo train --actor-model {0} --rm-model ...
mlx_lm.generate --model {0} --prompt "..."
```"""
USE_RM = """```
mlx-grpo train --rm-model {0} --actor-model ...
```"""


def model_card(
    opened: OpenedSource, title: str, table: Sequence[tuple[str, str]], usage: str
) -> str:
    """README.md of a converted model.

    Args:
        table: (what, value) of the conversion's table.
    """
    source, base, known = opened.source, opened.base, opened.licence
    rows: list[tuple[str, str]] = [("source", _described(source))]
    if base is not source:
        rows.append(("base of the adapter", _described(base)))
    rows += [
        ("licence", known or "unknown: ask where the source came from"),
        ("architecture", str(opened.config.get("model_type"))),
        *table,
        ("made with", ", ".join(f"{p} {version(p)}" for p in ("mlx-grpo", "mlx", "mlx-lm"))),
    ]
    head = ["library_name: mlx", *([f"license: {known}"] if known and " " not in known else [])]
    head += [f"base_model: {base.name}"] if base.revision else []
    head += [f"base_model_relation: {FINETUNE}"] if base.revision and base is not source else []
    return "\n".join(
        [
            *("---", *head, "---", f"# {title}", "", "Converted by `mlx-grpo convert`.", ""),
            *("| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows), ""),
            *("## Use", "", usage, ""),
        ]
    )


def _described(source: Source) -> str:
    # of an absolute path only the name: where it lay on this machine is nobody's business
    name = source.path.name if Path(source.name).is_absolute() else source.name
    return f"`{name}`" + (f", revision `{source.revision}`" if source.revision else "")
