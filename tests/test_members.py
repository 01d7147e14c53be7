"""Every public member of every axis stands in a table of `members.py`, or is named there
with the module that tests it."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import pytest

import metaopt as mo
from members import ADJOINTS, ELSEWHERE, LINEAR_SOLVERS, SOLVERS
from problems import CASES


AXES = (
    mo.extend.AbstractAdjoint,
    mo.extend.AbstractBilevelSolver,
    mo.extend.AbstractCurvature,
    mo.extend.AbstractData,
    mo.extend.AbstractErrorEstimate,
    mo.extend.AbstractLinearSolver,
    mo.extend.AbstractMemoryPlan,
    mo.extend.AbstractPreconditioner,
    mo.extend.AbstractProblem,
    mo.extend.AbstractSolver,
    mo.extend.AbstractStart,
    mo.extend.AbstractStatePolicy,
    mo.extend.AbstractTolerance,
    mo.callbacks.AbstractCallback,
)


NAMESPACES = (
    mo,
    mo.accuracy,
    mo.callbacks,
    mo.diagnostics,
    mo.extend,
    mo.few_shot,
    mo.linear,
    mo.memory,
    mo.nn,
)


def parts(node: Any) -> Iterator[str]:
    """The names of the classes of a member and of all that it holds."""
    yield type(node).__name__
    if isinstance(node, eqx.Module):
        for value in vars(node).values():
            yield from parts(value)


def in_tables() -> set[str]:
    cases = [make(jnp.float64) for make in CASES.values()]
    made = [
        member.make(case)
        for table in (ADJOINTS, LINEAR_SOLVERS, SOLVERS)
        for member in table.values()
        for case in cases
        if case.kind in member.serves
    ]
    made += [case.problem for case in cases]
    return {name for node in made for name in parts(node)}


def members() -> list[str]:
    """The names of the public classes of the axes that are not abstract."""
    classes = [
        cls
        for namespace in NAMESPACES
        for cls in vars(namespace).values()
        if inspect.isclass(cls) and issubclass(cls, AXES)
    ]
    return sorted({c.__name__ for c in classes if not c.__name__.startswith("Abstract")})


IN_TABLES, MEMBERS = in_tables(), members()


@pytest.mark.parametrize("name", MEMBERS)
def test_member_is_tested(name):
    # In one place: a member that has come into a table is no longer named elsewhere.
    assert (name in IN_TABLES) != (name in ELSEWHERE)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_module_that_tests_a_member_names_it(name):
    assert name in MEMBERS
    text = (Path(__file__).parent / ELSEWHERE[name]).read_text(encoding="utf-8")
    assert f".{name}" in text or f" {name}" in text


def test_all_axes_are_seen():
    assert {"CG", "Descent", "UnrolledAdjoint", "WarmStart", "Log"} <= set(MEMBERS)
