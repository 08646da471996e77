"""The shape of the package, read from its syntax trees: one way to import, one place that prints,
one place that knows the device."""

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_grpo"
ORDER = (
    ("core",),
    ("backend",),
    ("files",),
    ("config",),
    ("console",),
    ("data",),
    ("distributed",),
    ("models",),
    ("plan", "rewards", "reward_modeling", "convert"),
    ("grpo",),
    ("run",),
    ("report", "export"),
    ("training",),
    ("evaluation",),
    ("demo", "api"),
    ("doctor",),
    ("cli",),
)
"""The rooms; each may import from those above it. Rooms on one line do not know each other."""
PURE = ("core.types", "core.errors", "core.rng", "grpo.loss", "grpo.kl_estimators")
MAY_BE_PURE = {f"mlx_grpo.{name}" for name in ("core.types", "core.errors", "grpo.kl_estimators")}
STAGES = ("grpo.rollout", "grpo.logprob", "grpo.advantages", "grpo.loss", "grpo.update")
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


def room(module: str) -> str:
    """The folder or file at the top of the package that a module is in."""
    return f"{module}.".split(".")[1]


def wrong_way(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up the order of the rooms."""
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    return sorted(
        f"{importer} imports {imported}"
        for importer, all_imported in graph.items()
        for imported in all_imported
        for here, there in [(room(importer), room(imported))]
        if {here, there} <= level.keys() and here != there and level[here] <= level[there]
    )


def test_imports_form_no_cycle(trees: Trees) -> None:
    graph = import_graph(trees)
    assert graph["mlx_grpo.training.loop"] >= {"mlx_grpo.grpo.iteration", "mlx_grpo.run.log"}
    assert graph["mlx_grpo.grpo.iteration"] >= {"mlx_grpo.grpo.rollout", "mlx_grpo.grpo.update"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names it
    assert set(order) == set(trees)


def test_imports_go_one_way_through_the_rooms(trees: Trees) -> None:
    rooms = {room(name) for name in trees} - {"", "__main__", "rubric"}
    assert rooms == {name for names in ORDER for name in names}
    assert wrong_way(import_graph(trees)) == []


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_only_pure_modules(trees: Trees, name: str) -> None:
    assert import_graph(trees)[f"mlx_grpo.{name}"] <= MAY_BE_PURE


def test_the_controller_imports_nothing(trees: Trees) -> None:
    assert import_graph(trees)["mlx_grpo.grpo.kl_controller"] == set()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_knows_neither_settings_nor_console(trees: Trees, name: str) -> None:
    graph = import_graph(trees)
    reached, new = set(), {f"mlx_grpo.{name}"}
    while new:
        reached |= new
        new = set().union(*(graph[m] for m in new)) - reached
    assert not {m for m in reached if room(m) in ("config", "console", "run", "training", "cli")}


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
    up = {"mlx_grpo.core.a": {"mlx_grpo.grpo.b"}, "mlx_grpo.grpo.b": {"mlx_grpo.core.a"}}
    assert wrong_way(up) == ["mlx_grpo.core.a imports mlx_grpo.grpo.b"]
    assert printing(trees["b"]) == [2, 3]
    assert device_checks(trees["c"]) == ["default_device", "platform"]
