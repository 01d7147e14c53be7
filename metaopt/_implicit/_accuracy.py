"""The accuracy that is asked of an implicit derivative."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp

from .._core._results import RESULTS, where_result
from .._core._types import FloatScalar, Vector
from .._linear import (
    AbstractLinearSolver,
    AbstractToleranceSolver,
    coarsest_eps,
    LinearSolution,
)
from ._error import AbstractErrorEstimate


_OF_RTOL = 0.1


class Accuracy(eqx.Module):
    """The accuracy that is asked of an implicit derivative.

    **Attributes:**

    - `rtol`, `inner_rtol`, `error`: as for [`metaopt.ImplicitAdjoint`][].
    - `is_biased`: whether the linear solution leaves something out by request.
    """

    rtol: float = eqx.field(static=True)
    inner_rtol: float | None = eqx.field(static=True)
    error: AbstractErrorEstimate | None
    is_biased: bool = eqx.field(static=True)

    @property
    def judges_error(self) -> bool:
        """Whether the error of the derivative decides, and not that of the params."""
        judged = self.error is not None and self.inner_rtol is None
        return judged and not self.is_biased and self.rtol != jnp.inf

    @property
    def own_inner_rtol(self) -> float:
        """The relative error of the params that is accepted where that decides."""
        return self.rtol if self.inner_rtol is None else self.inner_rtol

    def allowed_error(
        self, size: FloatScalar, tolerance: FloatScalar | None
    ) -> FloatScalar | None:
        """The largest error of a derivative of norm `size`, or `None` for any."""
        if not self.judges_error:
            return None
        allowed = self.rtol * size
        if tolerance is None:
            return allowed
        # The outer loop has the residuals held to its tolerance, and not the error.
        return jnp.where(tolerance > _OF_RTOL * self.rtol, jnp.inf, allowed)

    def tightened(
        self, solver: AbstractLinearSolver, vector: Vector
    ) -> AbstractLinearSolver:
        """Return a linear solver that is at least as exact as `rtol` needs, as far as the
        dtype of `vector` allows. One with a fixed number of steps is returned
        unchanged."""
        if not isinstance(solver, AbstractToleranceSolver):
            return solver
        own, needed = solver.relative_tolerance, self._linear_rtol(vector)
        if own is None or own <= needed:
            return solver
        return solver.with_rtol(needed)

    def passed(self, linear: LinearSolution, vector: Vector) -> LinearSolution:
        """The solution of a linear system, as a success where its solver stopped improving
        at a residual that `rtol` does not need to be smaller.

        In float32 a residual of 1e-5 is met by luck where the system is ill-conditioned.
        Only where the error of the derivative is judged, which sees the effect.
        """
        if not self.judges_error:
            return linear
        stagnated = linear.result == RESULTS.linear_stagnation
        enough = linear.residual <= self._linear_rtol(vector)
        result = where_result(stagnated & enough, RESULTS.successful, linear.result)
        return dataclasses.replace(linear, result=result)

    def _linear_rtol(self, vector: Vector) -> float:
        """The relative residual that suffices."""
        asked = self.rtol
        if self.inner_rtol is not None and self.inner_rtol < jnp.inf:
            # A rough inner solution that is accepted needs no exact linear one.
            asked = max(asked, self.inner_rtol)
        return max(_OF_RTOL * asked, 10 * coarsest_eps(vector))
