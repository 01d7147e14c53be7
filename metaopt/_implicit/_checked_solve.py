"""Linear solves with a check of the curvature that no linear solver has to make."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import divided, scale_and_norm, tree_dot, tree_norm
from .._core._types import FloatScalar, Vector
from .._linear import (
    AbstractLinearSolver,
    AbstractToleranceSolver,
    CG,
    coarsest_eps,
    LinearSolution,
)


def checked_solve(
    solver: AbstractLinearSolver,
    operator: lx.AbstractLinearOperator,
    vector: Vector,
    start: Vector | None = None,
    tolerance: FloatScalar | None = None,
) -> LinearSolution:
    """Solve a linear system and check the curvature that acts on its solution.

    Methods that do not look at curvature solve at a saddle or a maximum like anywhere
    else, and their solution is not the response of a minimum. For a solver that accepts
    indefinite operators, negative curvature is only reported.

    **Arguments:** those of [`metaopt.extend.AbstractLinearSolver`][]`.solve`.

    **Returns:**

    A [`metaopt.linear.LinearSolution`][].
    """
    solution = solver.solve(operator, vector, start, tolerance)
    if solver.checks_curvature or not lx.is_positive_semidefinite(operator):
        return solution
    # Curvature has no scale of the right-hand side, whose square may be no number.
    # Without the barrier XLA takes a constant factor out of the vector again.
    scale, b = scale_and_norm(jax.lax.optimization_barrier(vector))
    unit = jax.lax.optimization_barrier(divided(vector, scale))
    scaled = divided(solution.value, scale)
    x = tree_norm(scaled)
    along = tree_dot(scaled, unit)  # x.A x, but for the residual
    negative = along < -solution.residual * x * b
    safe = jnp.where(x > 0, x, 1)
    smallest = jnp.minimum(
        solution.min_curvature, jnp.where(x > 0, along / safe**2, jnp.inf)
    )
    num_products = solution.num_products
    if solver.accepts_indefinite:
        negative = jnp.asarray(False)
    elif not solver.left_out:
        # Conjugate gradients meet each sign of curvature that acts on the solution.
        probe = CG(rtol=_probe_rtol(solver)).solve(operator, unit, None, tolerance)
        smallest = jnp.minimum(smallest, probe.min_curvature)
        num_products = num_products + probe.num_products
        rounding = 100 * coarsest_eps(vector) * b / safe
        negative |= probe.min_curvature < -rounding
    result = mask_result(negative, RESULTS.linear_indefinite)
    return dataclasses.replace(
        solution,
        result=first_failure(solution.result, result),
        min_curvature=smallest,
        num_products=num_products,
    )


def _probe_rtol(solver: AbstractLinearSolver) -> float:
    own = None
    if isinstance(solver, AbstractToleranceSolver):
        own = solver.relative_tolerance
    return 1e-5 if own is None else own
