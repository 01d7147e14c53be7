"""Bounds and estimates of the error of an implicit hypergradient."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import first_failure, mask_result, RESULTS, where_result
from .._core._tree import (
    divided,
    tree_dot,
    tree_scaled_norm,
    tree_sub,
)
from .._core._types import Aux, FloatScalar, Hyper, IntScalar, Vector
from .._linear import AbstractLinearSolver, LinearSolution
from .._solver import Optimality
from ._curvature import AbstractCurvature
from ._system import ImplicitSystem


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class Linearisation(eqx.Module):
    """The outer loss and the linear system at one point.

    **Attributes:**

    - `system`: the linear system, which holds the point.
    - `value`, `aux`: the outer loss.
    - `in_params`, `direct`: its derivatives in the params and in `hyper`.
    """

    system: ImplicitSystem
    value: FloatScalar
    aux: Aux
    in_params: Vector
    direct: Vector

    @classmethod
    def at(
        cls,
        curvature: AbstractCurvature,
        condition: Optimality,
        outer_loss: Callable[[Vector, Vector], Any],
        params: Vector,
        hyper: Vector,
    ) -> "Linearisation":
        """Differentiate the outer loss and linearise the optimality.

        **Arguments:**

        - `curvature`, `condition`: as for `ImplicitSystem.linearised`.
        - `outer_loss`: `outer_loss(params, hyper)` returns its value and auxiliary output.
        - `params`, `hyper`: the point.
        """
        value, pullback, aux = jax.vjp(outer_loss, params, hyper, has_aux=True)
        in_params, direct = pullback(jnp.ones((), value.dtype))
        system = ImplicitSystem.linearised(condition, params, hyper, curvature)
        return cls(system, value, aux, in_params, direct)

    def solved_with(self, linear_solver: AbstractLinearSolver) -> "Linearisation":
        """The same with a linear solver that is ready for its operator."""
        system = dataclasses.replace(self.system, linear_solver=linear_solver)
        return dataclasses.replace(self, system=system)

    def through_solution(self, linear_solution: Vector) -> Vector:
        """The part of the hypergradient that passes through the inner solution."""
        out = self.system.cross_transposed(linear_solution)
        return jax.tree.map(jnp.negative, out)

    def through_solution_both(self, first: Vector, second: Vector) -> tuple[Vector, Vector]:
        """`through_solution` of two vectors in one pass."""
        stacked = jax.tree.map(lambda a, b: jnp.stack([-a, -b]), first, second)
        both = jax.vmap(self.system.cross_transposed)(stacked)
        pick = lambda index: jax.tree.map(lambda leaf: leaf[index], both)
        return pick(0), pick(1)

    def linear_residual(self, linear_solution: Vector) -> Vector:
        """The residual of the exact linear system.

        The error of a hypergradient is that of its linear solution in the system with
        the exact Jacobian, whatever operator it came from.
        """
        return self.system.remaining(linear_solution, self.in_params, transposed=True)

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
        if not self.system.curvature.is_exact:
            return quotient
        return jnp.minimum(quotient, linear.min_curvature)


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
    """An estimate or a bound of the error of an implicit hypergradient.

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
        hyper: Hyper,
    ) -> ErrorEstimate:
        """Estimate the error of the hypergradient.

        **Arguments:**

        - `here`: the linearisation at the inner solution, its linear solver prepared.
        - `linear`: the solution of the linear system there.
        - `gradient`: the hypergradient from the two.
        - `at`: the linearisation at other params.
        - `hyper`: the outer variables.

        **Returns:**

        An `ErrorEstimate`.
        """
