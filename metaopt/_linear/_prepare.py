"""Getting a linear solver ready for an operator: its preconditioner, say."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._types import IntScalar, Key, Vector
from ._base import AbstractLinearSolver, AbstractPreconditionedSolver
from ._preconditioner import AbstractPreconditioner
from ._shine import SHINE, with_inverse


class Prepared(eqx.Module):
    """A preconditioner with what it knows of one operator: a function of vectors."""

    preconditioner: AbstractPreconditioner
    state: Any

    def __call__(self, vector: Vector) -> Vector:
        return self.preconditioner.apply(self.state, vector)


def initial_state(solver: AbstractLinearSolver, vector: Vector) -> Any:
    """The state of the solver's preconditioner before the first solve, or `None`."""
    if not isinstance(solver, AbstractPreconditionedSolver):
        return None
    if not isinstance(solver.preconditioner, AbstractPreconditioner):
        return None
    return solver.preconditioner.init(vector)


def prepare(
    solver: AbstractLinearSolver,
    operator: lx.AbstractLinearOperator,
    state: Any = None,
    key: Key | None = None,
    solver_state: Any = None,
) -> tuple[AbstractLinearSolver, Any, IntScalar]:
    """The solver with all that it knows beforehand, ready for an operator.

    **Arguments:**

    - `solver`: any linear solver. One without preconditioner is ready, but for one that
        takes what the inner solver leaves.
    - `operator`: what it will solve with.
    - `state`: the state of the preconditioner; by default its first.
    - `key`: for everything random; by default key 0.
    - `solver_state`: the state of the inner solver at the solution, or `None`.

    **Returns:**

    The solver, the new state of the preconditioner, and the products that it took.
    """
    none = jnp.zeros((), jnp.int32)
    if isinstance(solver, SHINE):
        return with_inverse(solver, solver_state), None, none
    if not isinstance(solver, AbstractPreconditionedSolver):
        return solver, None, none
    preconditioner = solver.preconditioner
    if not isinstance(preconditioner, AbstractPreconditioner):
        return solver, None, none
    if state is None:
        state = preconditioner.init(operator.in_structure())
    if key is None:
        key = jax.random.key(0)
    damped = solver.damped(operator)
    state, num_products = preconditioner.update(damped, state, key, solver_state)
    ready = dataclasses.replace(solver, preconditioner=Prepared(preconditioner, state))
    return ready, state, num_products
