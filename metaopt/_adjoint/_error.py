"""Bounds and estimates of the error of an implicit hypergradient."""

import abc
from collections.abc import Callable
from typing import Any, Protocol, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._linear import LinearSolution
from .._operators import cross_pullback
from .._results import first_failure, mask_result, RESULTS, where_result
from .._solver import Optimality
from .._tree import (
    divided,
    tree_dot,
    tree_scaled_norm,
    tree_sub,
)
from .._types import Aux, FloatScalar, Hyper, IntScalar, Vector
from ._curvature import AbstractCurvature


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class Linearisation:
    """The outer loss and the optimality at one point, with their derivatives.

    **Attributes:**

    - `params`, `hyper`: the point, trainable parts.
    - `value`, `aux`: the outer loss.
    - `in_params`, `direct`: its derivatives, times a scale.
    - `residual`, `jacobian`: the optimality and its Jacobian in `params`, both exact.
    - `operator`: what the linear system is solved with, which may leave curvature out.
    """

    value: FloatScalar
    aux: Aux

    def __init__(
        self,
        curvature: AbstractCurvature,
        condition: Optimality,
        outer_loss: Callable[[Vector, Vector], Any],
        params: Vector,
        hyper: Vector,
        scale: FloatScalar,
    ):
        self.condition = condition
        self.params, self.hyper = params, hyper
        self.value, pullback, self.aux = jax.vjp(outer_loss, params, hyper, has_aux=True)
        self.in_params, self.direct = pullback(scale.astype(self.value.dtype))
        self.curvature = curvature
        self.residual, self.operator, self.jacobian = curvature.linearise(
            condition, params, hyper
        )

    def through_solution(self, linear_solution: Vector) -> Vector:
        """The part of the hypergradient by way of the inner solution."""
        along = lambda h: self.condition(self.params, h)
        out = cross_pullback(along, self.hyper, linear_solution)
        return jax.tree.map(jnp.negative, out)

    def through_solution_both(self, first: Vector, second: Vector) -> tuple[Vector, Vector]:
        """`through_solution` of two vectors in one pass."""
        along = lambda h: self.condition(self.params, h)
        _, pullback = jax.vjp(along, self.hyper)
        stacked = jax.tree.map(lambda a, b: jnp.stack([-a, -b]), first, second)
        (both,) = jax.vmap(pullback)(stacked)
        pick = lambda index: jax.tree.map(lambda leaf: leaf[index], both)
        return pick(0), pick(1)

    def linear_residual(self, linear_solution: Vector) -> Vector:
        """The residual of the exact linear system.

        The error of a hypergradient is that of its linear solution in the system with
        the exact Jacobian, whatever operator it came from. In a system that leaves
        curvature out the residual is small however much that was.
        """
        jacobian = self.jacobian
        if lx.symmetric_tag not in self.condition.tags:
            jacobian = jacobian.transpose()
        return tree_sub(self.in_params, jacobian.mv(linear_solution))

    def smallest_curvature(self, linear: LinearSolution, left: Vector) -> FloatScalar:
        """The smallest curvature of the exact Jacobian that was met.

        **Arguments:**

        - `linear`: the solution $w$ of the linear system.
        - `left`: what it leaves of the right-hand side $b$, so that $w . A w$ is
            $w . (b - left)$.
        """
        size = tree_scaled_norm(linear.value)
        safe = jnp.where(size > 0, size, 1)
        unit = divided(linear.value, safe)
        product = divided(tree_sub(self.in_params, left), safe)
        quotient = jnp.where(size > 0, tree_dot(unit, product), jnp.inf)
        if not self.curvature.is_exact:
            return quotient
        return jnp.minimum(quotient, linear.min_curvature)


class Solve(Protocol):
    """A solve with the operator of a linearisation, or with its transpose."""

    def __call__(
        self,
        here: Linearisation,
        vector: Vector,
        *,
        transposed: bool,
        rtol: float,
        tolerance: FloatScalar | None = None,
    ) -> LinearSolution: ...


class ErrorEstimate(eqx.Module):
    """The estimated error of an implicit hypergradient.

    **Attributes:**

    - `error`: the Euclidean norm of the error of the hypergradient.
    - `linear_share`: the part of the remaining right-hand side of the linear system that
        its own solution left, from 0 to 1. The inexact inner solution left the rest.
    - `num_products`: the products with the Jacobian that the estimate took.
    - `min_curvature`: the smallest curvature that was met on the way, infinite where the
        linear solver does not look.
    - `result`: whether an assumption of the estimate is contradicted.
    """

    error: FloatScalar
    linear_share: FloatScalar
    num_products: IntScalar
    min_curvature: FloatScalar
    result: RESULTS

    def judged(self, allowed: FloatScalar | None) -> Any:
        """The result of the estimate, a failure where the error is larger than allowed."""
        if allowed is None:
            return self.result
        cause = where_result(
            self.linear_share > 0.5, RESULTS.linear_inaccurate, RESULTS.inner_not_converged
        )
        return first_failure(self.result, mask_result(~(self.error <= allowed), cause))


class AbstractErrorEstimate(eqx.Module):
    """A way to say how wrong an implicit hypergradient is.

    The error has two causes: the inner solution is not exact, and nor is the solution of
    the linear system.
    """

    is_bound: AbstractClassVar[bool]
    """Whether the error cannot be larger, in exact arithmetic."""

    @abc.abstractmethod
    def __call__(
        self,
        here: Linearisation,
        linear: LinearSolution,
        gradient: Vector,
        at: Callable[[Vector], Linearisation],
        solve: Solve,
        hyper: Hyper,
    ) -> ErrorEstimate:
        """Estimate the error of the hypergradient.

        **Arguments:**

        - `here`: the linearisation at the inner solution.
        - `linear`: the solution of the linear system there.
        - `gradient`: the hypergradient from the two.
        - `at`: the linearisation at other params.
        - `solve`: `solve(here, vector, transposed=..., rtol=..., tolerance=...)`, the
            linear solver, to `rtol` or to `tolerance`, whichever is larger.
        - `hyper`: the outer variables.

        **Returns:**

        An `ErrorEstimate`.
        """
