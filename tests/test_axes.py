"""The house rule for axes: their members know nothing of each other's kinds.

A module in the folder of one axis may import the abstract bases of another axis and
plain values, and asks (`isinstance`, `check_kind`) for abstract bases alone. The axes are
those of the table in `docs/design.md`.
"""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping

import equinox as eqx
import pytest

from our_source import import_module, MODULES, parse, REPOSITORY


# A default is a value that a user can replace. The other entries build a member for a
# purpose of their own, and ask nobody whether it is one.
IMPORTS: dict[str, dict[str, str]] = {
    "_adjoint._implicit": {
        "CG": "default",
        "DualWeighted": "default",
        "ExactCurvature": "default",
    },
    "_equilibrium._layer": {
        "Anderson": "default",
        "FullBatch": "a layer is solved on no data",
        "ImplicitAdjoint": "default",
        "BiCGStab": "default",
    },
    "_implicit._checked_solve": {
        "CG": "looks for negative curvature beside a solver that does not",
    },
    "_implicit._curvature": {
        "CG": "the solver that fits a curvature",
        "MINRES": "the solver that fits a curvature",
    },
    "_implicit._linear_fixed_point": {
        "Anderson": "default",
        "FixedPointProblem": "states a linear system as a problem",
        "FullBatch": "a linear system is solved on no data",
    },
    "_implicit._system": {"CG": "default"},
    "_solver._newton_krylov": {"GMRES": "default"},
}

# Asked for by name, outside of the folders of axes.
ASKED: dict[str, dict[str, str]] = {
    "_objective._loop_error": {
        "ForwardAdjoint": "a remedy, which is not proposed where it is in use",
    },
    "diagnostics._retrain": {"Descent": "trains by a schedule of its transform"},
}


def base_names(text: str) -> list[str]:
    """The base classes in the table of axes, its third column."""
    return re.findall(r"^\|[^|\n]+\|[^|\n]+\| `(Abstract\w+)` \|", text, re.M)


def our_classes() -> dict[str, type]:
    return {
        cls.__name__: cls
        for name in MODULES
        for cls in vars(import_module(name)).values()
        if inspect.isclass(cls)
        and issubclass(cls, eqx.Module)
        and cls.__module__.startswith("metaopt.")
    }


def folder(module: str) -> str:
    """The folder or the file of a module right below the package."""
    return module.removeprefix("metaopt.").split(".")[0]


def members() -> dict[str, str]:
    """Each concrete member of an axis, with the folder that it lies in."""
    classes = our_classes()
    design = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    bases = tuple(classes[name] for name in base_names(design))
    return {
        name: folder(cls.__module__)
        for name, cls in classes.items()
        if issubclass(cls, bases) and not name.lstrip("_").startswith("Abstract")
    }


MEMBERS = members()
# Entry points drive members of all axes, and are none although they define wrappers.
AXES = set(MEMBERS.values()) - {"few_shot", "diagnostics"}


def imported(tree: ast.AST, here: str, members: Mapping[str, str]) -> Iterator[str]:
    """The members of axes in other folders that a module imports."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level or str(node.module).startswith("metaopt"):
            names = [alias.name for alias in node.names]
            yield from (name for name in names if members.get(name, here) != here)


def asked_for(tree: ast.AST, here: str, members: Mapping[str, str]) -> Iterator[str]:
    """The members of axes in other folders that a module tests an object against."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=called), args=[_, kind, *_]):
                if called in ("isinstance", "issubclass", "check_kind"):
                    parts = [p.id for p in ast.walk(kind) if isinstance(p, ast.Name)]
                    yield from (part for part in parts if members.get(part, here) != here)


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) in AXES])
def test_axis_imports_no_member_of_another(name):
    if MODULES[name].name != "__init__.py":
        found = set(imported(parse(MODULES[name]), folder(name), MEMBERS))
        assert found == IMPORTS.get(name, {}).keys()


@pytest.mark.parametrize("name", MODULES)
def test_no_module_asks_for_a_member_of_another_axis(name):
    found = set(asked_for(parse(MODULES[name]), folder(name), MEMBERS))
    assert found == ASKED.get(name, {}).keys()


def test_axes_were_found():
    assert {"_adjoint", "_linear", "_solver", "_implicit", "_problem"} <= AXES
    assert MEMBERS["UnrolledAdjoint"] == MEMBERS["StoreAll"] == "_adjoint"
    assert MEMBERS["SHINE"] == "_linear" and MEMBERS["FrozenState"] == "_problem"
    assert not any(name.startswith("Abstract") for name in MEMBERS)
    assert {*IMPORTS, *ASKED} <= MODULES.keys()


def test_axis_faults_are_seen():
    members = {"CG": "_linear", "SHINE": "_linear", "Descent": "_solver"}
    source = """
from .._linear import AbstractLinearSolver, CG
from .._solver import Descent as Other
from lineax import GMRES, SHINE
import optax

def check(x):
    return isinstance(x, (AbstractLinearSolver, SHINE)) or check_kind(x, CG | None, "x")
"""
    tree = ast.parse(source)
    assert list(imported(tree, "_adjoint", members)) == ["CG", "Descent"]
    assert list(imported(tree, "_linear", members)) == ["Descent"]
    assert list(asked_for(tree, "_adjoint", members)) == ["SHINE", "CG"]
    assert list(asked_for(tree, "_linear", members)) == []
    table = (
        "| axis | a | base class | b |\n|---|---|---|---|\n| x | y | `AbstractX` | `Z` |\n"
    )
    assert base_names(table) == ["AbstractX"]
