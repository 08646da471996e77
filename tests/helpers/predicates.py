"""The predicates that mlx-lm's families define, without their models."""

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

from mlx_lm import models

MIXTURE = SimpleNamespace(
    args=SimpleNamespace(num_experts=4, use_moe=True, text=SimpleNamespace(num_hidden_layers=4)),
    layers=[SimpleNamespace(is_linear=False)] * 4,
)
"""What predicates ask of their model."""


def families_with(predicate: str) -> list[str]:
    """Names of the modules that define it themselves."""
    files = sorted(Path(models.__path__[0]).glob("*.py"))
    return [f.stem for f in files if f"def {predicate}(" in f.read_text()]


def own_predicates(family: str, predicate: str) -> list[tuple[Callable[..., Any], list[str]]]:
    """Each with the parts of names that it looks for; without those that ask an inner model's."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    found = []
    for _, kind in inspect.getmembers(module, inspect.isclass):
        own = vars(kind).get(predicate)
        if kind.__module__ != module.__name__ or own is None:
            continue
        source = dedent(inspect.getsource(own.fget))
        if f".{predicate}" not in source:
            found.append((own.fget(MIXTURE), parts_of_names(source)))
    return found


def parts_of_names(source: str) -> list[str]:
    """The constants of a function that may be parts of a parameter's or layer's name."""
    tree = ast.parse(source)
    first = tree.body[0]
    assert isinstance(first, ast.FunctionDef)
    documented = {ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    keys = ("bits", "group_size", "mode", ".")
    return [t for t in texts if isinstance(t, str) and t not in {*keys, *documented}]
