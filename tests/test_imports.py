"""The house rules for imports: floors, no cycle, none inside a function."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from our_source import COMMAND_LINE, module_name, MODULES, parse, REPOSITORY, ROOT


def import_targets(node: ast.stmt, name: str, path: Path) -> list[str]:
    """Absolute dotted names that an import statement of module `name` may mean."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = ["metaopt", *(() if name == ROOT else name.split("."))]
        if path.name != "__init__.py":
            parts.pop()
        parts = parts[: len(parts) - node.level + 1]
        base = ".".join([*parts, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def our_imports(node: ast.stmt, name: str, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a statement of module `name` imports."""
    found = set()
    for target in import_targets(node, name, modules[name]):
        head, *parts = target.split(".")
        if head != "metaopt":
            continue
        # Of `from ._x import Y`, Y is a name in `_x` unless it is itself a module.
        while parts and ".".join(parts) not in modules:
            parts.pop()
        module = ".".join(parts) or ROOT
        found.add(module)
        # Python runs the `__init__.py` of every package on the way, too.
        for depth in range(1, len(parts)):
            package = ".".join(parts[:depth])
            if not name.startswith(f"{package}.") and name != package:
                found.add(package)
    return found


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    return {
        name: {
            target
            for node in ast.walk(parse(path))
            if isinstance(node, ast.stmt)
            for target in our_imports(node, name, modules)
        }
        for name, path in modules.items()
    }


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle, as the list of its modules, or an empty list."""
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(graph[name]):
            cycle = visit(target, [*trail, name])
            if cycle:
                return cycle
        finished.add(name)
        return []

    for name in sorted(graph):
        cycle = visit(name, [])
        if cycle:
            return cycle
    return []


def parse_floors(text: str) -> list[list[str]]:
    """The floors of `docs/design.md`, lowest first.

    They are the fenced block after the comment `<!-- floors -->`: one line for each
    floor, names of modules separated by spaces, without `metaopt.`. A package stands
    for all of its modules that are not named themselves.
    """
    found = re.search(r"<!-- floors -->\s*\n```\w*\n(.*?)^```", text, re.DOTALL | re.M)
    if found is None:
        raise ValueError(
            "docs/design.md has no fenced block after the comment `<!-- floors -->`."
        )
    return [line.split() for line in found[1].splitlines() if line.strip()]


def floor_faults(floors: list[list[str]], graph: dict[str, set[str]]) -> Iterator[str]:
    """Where the imports do not follow the floors."""
    names = [name for floor in floors for name in floor]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is on the floors of docs/design.md more than once"
    for name in names:
        if name not in graph:
            yield f"{name} is on the floors of docs/design.md, but is no module"
    floor_of = {name: i for i, floor in enumerate(floors) for name in floor}
    floor_of[ROOT] = len(floors)
    floor_of[COMMAND_LINE] = len(floors) + 1

    def entry(module: str) -> str | None:
        parts = module.split(".")
        while parts and ".".join(parts) not in floor_of:
            parts.pop()
        return ".".join(parts) or None

    for name in sorted(graph):
        if entry(name) is None:
            yield f"{name} is missing from the floors of docs/design.md"
    for name, targets in sorted(graph.items()):
        here = entry(name)
        for target in sorted(targets):
            there = entry(target)
            if here is None or there is None or here == there:
                continue
            if not floor_of[there] < floor_of[here]:
                yield (
                    f"{name} (floor {floor_of[here] + 1}) imports {target} "
                    f"(floor {floor_of[there] + 1}); only lower floors may be imported"
                )


def test_imports_follow_the_floors():
    design = REPOSITORY / "docs" / "design.md"
    floors = parse_floors(design.read_text(encoding="utf-8"))
    assert list(floor_faults(floors, import_graph(MODULES))) == []


def test_imports_have_no_cycle():
    assert find_cycle(import_graph(MODULES)) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_import_of_ours_in_a_function(name):
    inside = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for function in ast.walk(parse(MODULES[name]))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.stmt) and our_imports(node, name, MODULES)
    ]
    assert inside == []


def test_import_faults_are_seen(tmp_path):
    sources = {
        "__init__.py": "from ._b import f as f\n",
        "_a.py": "import jax\n",
        "_b.py": "from . import _a\n",
        "_c/__init__.py": "from ._d import g as g\n",
        "_c/_d.py": "from .._b import f\nfrom metaopt import f as h\n",
        "_e.py": "from ._c._d import g\nimport metaopt._a\n",
    }
    for path, source in sources.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    modules = {module_name(tmp_path / path, tmp_path): tmp_path / path for path in sources}
    graph = import_graph(modules)
    assert graph == {
        "__init__": {"_b"},
        "_a": set(),
        "_b": {"_a"},
        "_c": {"_c._d"},
        "_c._d": {"_b", "__init__"},
        "_e": {"_c._d", "_c", "_a"},
    }
    assert find_cycle(graph) == []
    assert find_cycle(graph | {"_a": {"_c._d"}}) == [
        *("__init__", "_b", "_a", "_c._d", "__init__")
    ]

    def faults(text):
        return list(floor_faults(parse_floors(text), graph))

    block = "<!-- floors -->\n\n```text\n{}\n```\n"
    only = ["_c._d (floor 3) imports __init__ (floor 5); only lower floors may be imported"]
    assert faults(block.format("_a\n_b\n_c\n_e")) == only
    assert faults(block.format("_a\n_b\n_c._d\n_c\n_e")) == [only[0].replace("5", "6")]
    assert "_e is missing" in faults(block.format("_a\n_b\n_c"))[0]
    assert "_x is on the floors" in faults(block.format("_a _x\n_b\n_c\n_e"))[0]
    assert "more than once" in faults(block.format("_a\n_b _a\n_c\n_e"))[0]
    assert "_b (floor 1) imports _a (floor 1)" in faults(block.format("_a _b\n_c\n_e"))[0]
    with pytest.raises(ValueError, match="no fenced block"):
        parse_floors("# Design\n")
