"""The shape of the package, read from its syntax trees: one way to import, one place that prints,
one place that knows the device."""

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_grpo"
PURE = ("types", "errors", "grpo", "kl_controller", "rng")
FOR_ALL = {"mlx_grpo.core.types", "mlx_grpo.core.errors"}
DEVICE_CHECKS = {
    *("default_device", "set_default_device", "device_info", "is_available", "metal", "cuda"),
    *("platform", "uname", "machine", "system"),
}

Trees = dict[str, ast.Module]


def module_name(file: Path) -> str:
    """mlx_grpo/convert/__init__.py is mlx_grpo.convert.convert."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def trees() -> Trees:
    """Syntax tree of every module of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    return {module_name(f): ast.parse(f.read_text(encoding="utf-8")) for f in files}


def imported(tree: ast.Module, modules: Iterable[str]) -> set[str]:
    """Modules of the package that a tree names in any import, those inside functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by full name"
            source = node.module or ""
            children = {f"{source}.{alias.name}" for alias in node.names}
            submodules = children & set(modules)
            found |= submodules if len(submodules) == len(children) else submodules | {source}
    return found & set(modules)


def import_graph(trees: Trees) -> dict[str, set[str]]:
    """What each module imports of the package."""
    return {name: imported(tree, trees) for name, tree in trees.items()}


def printing(tree: ast.Module) -> list[int]:
    """Lines that write to a standard stream."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if (
                name in ("print", "pprint")
                or name.endswith((".print", "stdout.write"))
                or name.endswith("stderr.write")
            ):
                lines.append(node.lineno)
    return lines


def device_checks(tree: ast.Module) -> list[str]:
    """Attributes and imported names that ask which machine this is."""
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names = {
        alias.name.split(".")[-1]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import | ast.ImportFrom)
        for alias in n.names
    }
    return sorted((attributes | names) & DEVICE_CHECKS)


def test_imports_form_no_cycle(trees: Trees) -> None:
    graph = import_graph(trees)
    assert graph["mlx_grpo.training.loop"] >= {"mlx_grpo.grpo.iteration", "mlx_grpo.run.log"}
    assert graph["mlx_grpo.grpo.iteration"] >= {"mlx_grpo.grpo.rollout", "mlx_grpo.grpo.update"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names it
    assert set(order) == set(trees)


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_only_types_and_errors(trees: Trees, name: str) -> None:
    assert import_graph(trees)[f"mlx_grpo.{name}"] <= FOR_ALL


@pytest.mark.parametrize("name", ("rollout", "update", "rewards", "logprob", "models.backbone"))
def test_a_stage_knows_neither_the_loop_nor_the_command_line(trees: Trees, name: str) -> None:
    graph = import_graph(trees)
    reached, new = set(), {f"mlx_grpo.{name}"}
    while new:
        reached |= new
        new = set().union(*(graph[m] for m in new)) - reached
    outside = ("trainer", "cli", "console", "demo", "config")
    assert not {m for m in reached if m.split(".")[1:2] and m.split(".")[1] in outside}


def test_only_the_console_prints(trees: Trees) -> None:
    assert printing(trees["mlx_grpo.console.output"])
    places = {
        name: printing(tree) for name, tree in trees.items() if name != "mlx_grpo.console.output"
    }
    assert {name: lines for name, lines in places.items() if lines} == {}


def test_only_the_backend_asks_for_device_and_platform(trees: Trees) -> None:
    assert {"default_device", "platform"} <= set(device_checks(trees["mlx_grpo.backend.device"]))
    places = {n: device_checks(tree) for n, tree in trees.items() if n != "mlx_grpo.backend.device"}
    assert {name: found for name, found in places.items() if found} == {}


def test_the_checks_see_what_they_look_for() -> None:
    trees = {
        "a": ast.parse("def f():\n    from b import g\n"),
        "b": ast.parse("import a\nprint(1)\nsys.stderr.write('x')\n"),
        "c": ast.parse("from sys import platform\nx = mx.default_device()\n"),
    }
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(trees)).static_order())
    assert printing(trees["b"]) == [2, 3]
    assert device_checks(trees["c"]) == ["default_device", "platform"]
