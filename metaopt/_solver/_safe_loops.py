"""Loops inside the linear solvers that other libraries are given."""

from typing import Any

import jax
import lineax as lx

from .._core._types import PyTree
from .._jaxpr._rewrite import carry_conditions


class _SafeLoops(lx.AbstractLinearSolver):
    """An iterative solver of lineax whose loops are rebuilt to carry their condition.

    `lineax.linear_solve` is a primitive that hides its loops, so they are rebuilt here,
    where they are made.
    """

    solver: lx.AbstractLinearSolver

    def init(self, operator, options):
        return self.solver.init(operator, options)

    def compute(self, state, vector, options):
        compute = lambda vector: self.solver.compute(state, vector, options)
        return carry_conditions(compute)(vector)

    def transpose(self, state, options):
        return self.solver.transpose(state, options)

    def conj(self, state, options):
        return self.solver.conj(state, options)

    def assume_full_rank(self):
        return self.solver.assume_full_rank()


def with_safe_loops(solver: PyTree) -> PyTree:
    """`solver`, a pytree, with every iterative solver of lineax in it made safe."""
    return jax.tree.map(
        lambda x: _SafeLoops(x) if _is_iterative(x) else x, solver, is_leaf=_is_iterative
    )


def _is_iterative(x: Any) -> bool:
    return isinstance(x, (lx.CG, lx.GMRES, lx.BiCGStab))
