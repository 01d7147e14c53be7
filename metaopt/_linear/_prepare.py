"""Preparing a linear solver for an operator: its preconditioner, for example."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from .._core._types import IntScalar, Key, Vector
from ._base import AbstractLinearSolver, AbstractPreparedSolver


def initial_state(solver: AbstractLinearSolver, vector: Vector) -> Any:
    """The state of a solver before it is prepared for the first time, or `None`."""
    if not isinstance(solver, AbstractPreparedSolver):
        return None
    return solver.initial_state(vector)


def prepare(
    solver: AbstractLinearSolver,
    operator: lx.AbstractLinearOperator,
    state: Any = None,
    key: Key | None = None,
    solver_state: Any = None,
) -> tuple[AbstractLinearSolver, Any, IntScalar]:
    """Prepare a linear solver for an operator.

    **Arguments:**

    - `solver`: any linear solver. One that is not an `AbstractPreparedSolver` is ready.
    - `operator`: what it will solve with.
    - `state`: the state of the solver; by default its first.
    - `key`: for everything random; by default key 0.
    - `solver_state`: the state of the inner solver at the solution, or `None`.

    **Returns:**

    The solver, its new state, and the products that it took.
    """
    if not isinstance(solver, AbstractPreparedSolver):
        return solver, None, jnp.zeros((), jnp.int32)
    if key is None:
        key = jax.random.key(0)
    return solver.prepared(operator, state, key, solver_state)


def transposed(solver: AbstractLinearSolver) -> AbstractLinearSolver:
    """The solver for the transpose of the operator that it was prepared for."""
    if not isinstance(solver, AbstractPreparedSolver):
        return solver
    return solver.transposed()
