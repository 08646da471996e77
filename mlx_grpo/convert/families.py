"""What transformers and mlx-lm each know about a configuration, without building a model.

transformers' configuration classes fill in what config.json leaves out, and need no PyTorch;
mlx-lm's `ModelArgs` and the source text of a family say which fields take part in its computation.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from types import ModuleType
from typing import Any

from mlx_lm.utils import _get_classes

SHARED_MODULES = ("base", "cache", "rope_utils", "activations", "switch_layers", "pipeline")
"""Of mlx-lm, used by many families: that they mention a field says nothing about one family."""


class Family:
    """mlx-lm's side: the `ModelArgs` of an architecture and the code that reads them."""

    def __init__(self, args: type) -> None:
        self.args: Any = args
        self.module = sys.modules[args.__module__]
        self.code = "\n".join(inspect.getsource(m) for m in _own_modules(self.module))

    def takes(self, field: str) -> bool:
        """Whether `ModelArgs` has the field."""
        return field in {f.name for f in fields(self.args)}

    def needs(self, field: str) -> bool:
        """Whether `ModelArgs` cannot be built without the field."""
        required = (f.name for f in fields(self.args) if f.default is f.default_factory is MISSING)
        return field in required

    def uses(self, field: str) -> bool:
        """Whether the code reads the field, as an attribute or out of a table."""
        return self.mentions(field) and (self.takes(field) or f'"{field}"' in self.code)

    def mentions(self, *names: str) -> bool:
        """Whether the code reads one of these names anywhere."""
        return re.search(rf"""[."']({"|".join(map(re.escape, names))})\b""", self.code) is not None


def mlx_family(config: dict[str, Any]) -> Family | None:
    """The family that mlx-lm builds of a configuration; None where it has none."""
    # an optional package that a family needs makes it leave the program
    with suppress(Exception, SystemExit):
        return Family(_get_classes(config)[1])
    return None


def text_family(family: Family, model_type: str) -> Family:
    """The family that a multimodal one uses for its `text_config`."""
    imported = {m.__name__.rsplit(".", 1)[1]: m for m in _own_modules(family.module)[1:]}
    own = imported.get(model_type) or next(iter(imported.values()), family.module)
    return Family(own.ModelArgs) if hasattr(own, "ModelArgs") else family


def _own_modules(module: ModuleType) -> list[ModuleType]:
    """The module of a family and those of other families that it builds on."""
    found = {module.__name__: module}
    for value in vars(module).values():
        name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
        parent, _, last = str(name).rpartition(".")
        if parent == "mlx_lm.models" and last not in SHARED_MODULES:
            found[name] = sys.modules[name]
    return list(found.values())


def canonical(config: dict[str, Any]) -> Any | None:
    """The configuration as transformers' own class completes it; None where it has none, or where
    the class refuses the values.

    No code of the source is run: only the classes that transformers ships are looked up.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with suppress(Exception):  # the classes check types, and raise what they like
        return CONFIG_MAPPING[config["model_type"]].from_dict(plain_floats(config))
    return None


def plain_floats(value: Any) -> Any:
    """transformers writes an infinity as a table, for want of one in JSON."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {n: plain_floats(v) for n, v in value.items()}
    return [plain_floats(v) for v in value] if isinstance(value, list) else value


def differing(known: Any) -> Iterator[tuple[str, Any]]:
    """(field, value) of what differs from the default of the configuration's class."""
    with suppress(Exception):  # some classes cannot be built without arguments
        usual = type(known)().to_dict()
        for name, value in known.to_dict().items():
            if name in usual and value != usual[name] and not name.startswith("_"):
                yield name, value
