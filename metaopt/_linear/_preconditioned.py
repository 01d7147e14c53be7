"""Linear solvers that take a preconditioner."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .._core._types import Vector
from ._base import AbstractPreparedSolver
from ._preconditioner import AbstractPreconditioner


class Prepared(eqx.Module):
    """A preconditioner prepared for one operator: a function of vectors."""

    preconditioner: AbstractPreconditioner
    state: Any

    def __call__(self, vector: Vector) -> Vector:
        return self.preconditioner.apply(self.state, vector)


class AbstractPreconditionedSolver(AbstractPreparedSolver):
    """A linear solver that takes a preconditioner.

    Its state is that of the preconditioner. An operator or a function as preconditioner is
    ready for use and has none.
    """

    preconditioner: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def damped(self, operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        """The operator that is solved with: the one that a preconditioner approximates.

        **Arguments:**

        - `operator`: a square operator.

        **Returns:**

        The operator, and the damping of the solver if it has any.
        """

    def initial_state(self, vector):
        if not isinstance(self.preconditioner, AbstractPreconditioner):
            return None
        return self.preconditioner.init(vector)

    def prepared(self, operator, state, key, solver_state):
        preconditioner = self.preconditioner
        if not isinstance(preconditioner, AbstractPreconditioner):
            return self, None, jnp.zeros((), jnp.int32)
        if state is None:
            state = preconditioner.init(operator.in_structure())
        damped = self.damped(operator)
        state, num_products = preconditioner.update(damped, state, key, solver_state)
        ready = dataclasses.replace(self, preconditioner=Prepared(preconditioner, state))
        return ready, state, num_products

    def transposed(self):
        return self
