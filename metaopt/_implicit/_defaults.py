"""The curvature and the linear solver for params that need not be a minimum."""

from .._linear import AbstractLinearSolver, CG, MINRES
from .._problem import AbstractPredictionProblem, AbstractProblem
from ._curvature import AbstractCurvature, ExactCurvature, GaussNewton


def cheapest_curvature(problem: AbstractProblem) -> AbstractCurvature:
    """Return `GaussNewton()` where the problem states its predictions, and else
    `ExactCurvature()`."""
    if isinstance(problem, AbstractPredictionProblem):
        return GaussNewton()
    return ExactCurvature()


def stationary_solver(curvature: AbstractCurvature, rtol: float) -> AbstractLinearSolver:
    """Return a linear solver for the symmetric system at a stationary point, which may be
    a saddle: the Hessian can be indefinite, and a Gauss-Newton operator is not."""
    if isinstance(curvature, GaussNewton):
        return CG(rtol=rtol)
    return MINRES(rtol=rtol)
