"""The curvature for params that need not be a minimum."""

from .._problem import AbstractPredictionProblem, AbstractProblem
from ._curvature import AbstractCurvature, ExactCurvature, GaussNewton


def cheapest_curvature(problem: AbstractProblem) -> AbstractCurvature:
    """Return `GaussNewton()` where the problem states its predictions, and else
    `ExactCurvature()`."""
    if isinstance(problem, AbstractPredictionProblem):
        return GaussNewton()
    return ExactCurvature()
