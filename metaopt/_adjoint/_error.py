"""How wrong an implicit hypergradient is: bounds and estimates."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from .._linear import LinearSolution
from .._operators import cross_pullback
from .._results import mask_result, RESULTS
from .._solver import Optimality
from .._tree import (
    divided,
    tree_add,
    tree_dot,
    tree_norm,
    tree_scaled_norm,
    tree_size,
    tree_sub,
)
from .._types import Aux, FloatScalar, Hyper, Vector
from .._validate import check_tolerance
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

    def gradient(self, linear_solution: Vector) -> Vector:
        """The hypergradient, from the solution of the linear system."""
        return tree_add(self.through_solution(linear_solution), self.direct)

    def linear_residual(self, linear_solution: Vector) -> Vector:
        """What is left of the right-hand side of the exact linear system.

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
        size = tree_norm(linear.value)
        unit = divided(linear.value, jnp.where(size > 0, size, 1))
        along = tree_dot(unit, tree_sub(self.in_params, left))
        quotient = jnp.where(size > 0, along / jnp.where(size > 0, size, 1), jnp.inf)
        if not self.curvature.is_exact:
            return quotient
        return jnp.minimum(quotient, linear.min_curvature)


class Solve(Protocol):
    """A solve with the Jacobian of a linearisation, or with its transpose."""

    def __call__(
        self, here: Linearisation, vector: Vector, *, transposed: bool
    ) -> LinearSolution: ...


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
        at: Callable[[Vector], Linearisation],
        solve: Solve,
        hyper: Hyper,
    ) -> tuple[FloatScalar, RESULTS]:
        """The Euclidean norm of the error of the hypergradient.

        **Arguments:**

        - `here`: the linearisation at the inner solution.
        - `linear`: the solution of the linear system there.
        - `at`: the linearisation at other params.
        - `solve`: `solve(here, vector, transposed=...)`, the linear solver.
        - `hyper`: the outer variables.

        **Returns:**

        A scalar, and whether what it stands on is in doubt.
        """


class DualWeighted(AbstractErrorEstimate):
    r"""Estimates the error by correcting it.

    A Newton step from the inner solution and one more solve for what is then left of the
    linear system give a hypergradient that is much better than the one in question, and
    the difference estimates the error of the latter: to about ten percent, unless both
    are far off. It costs two more linear solves and a second linearisation. Not a bound.

    What a [`metaopt.GaussNewton`][] operator leaves out is part of the estimate: what is
    left of the linear system is computed with the exact Jacobian, and that operator is
    only used to solve for what to add. Where it is a rough approximation so is the
    estimate, by as much.

    ??? cite "Source"

        Becker, Rannacher: *An optimal control approach to a posteriori error estimation
        in finite element methods*, 2001, applied to both systems.
    """

    is_bound: ClassVar[bool] = False

    def __call__(self, here, linear, at, solve, hyper):
        step = solve(here, here.residual, transposed=False)
        there = at(tree_sub(here.params, step.value))
        left = there.linear_residual(linear.value)
        change = solve(there, left, transposed=True)
        better = there.gradient(tree_add(linear.value, change.value))
        error = tree_scaled_norm(tree_sub(better, here.gradient(linear.value)))
        solved = (step.result == RESULTS.successful) & (change.result == RESULTS.successful)
        none = mask_result(solved, RESULTS.successful)
        return jnp.where(solved, error, jnp.inf), none


Constant = float | jax.Array | Callable[[Hyper], Any]
"""A number, or a function of `hyper` that returns one."""


class StrongConvexity(AbstractErrorEstimate):
    r"""Bounds the error of the hypergradient of a strongly convex inner problem.

    With inner residual $r$ and curvature $\mu$ the inner solution is within
    $\epsilon = \|r\| / \mu$ of the exact one. For the solution $w$ of the linear system
    $A w = b$, with $b = \partial_p F$ and residual $\rho$, and $C = \partial_h \nabla_p L$,
    the error of the hypergradient is at most

    $$L_h \epsilon + L_C \epsilon \|w\| + \frac{\|C\| + L_C \epsilon}{\mu}
    \left( \|\rho\| + L_A \epsilon \|w\| + L_F \epsilon \right).$$

    A certificate in exact arithmetic, as long as the constants are right: they are yours
    to know, along the way from the solution that was found to the exact one. Often ten
    times larger than the error. Use [`metaopt.DualWeighted`][] where they are not known.

    **Arguments:** each is a number, or a function of `hyper`.

    - `curvature`: $\mu > 0$, the least eigenvalue of the Hessian of the inner loss, or
        less. Where the linear solver meets a smaller one, the result says so.
    - `hessian_lipschitz`: $L_A$, how fast the Hessian changes with the params; 0 for a
        quadratic inner loss.
    - `cross_lipschitz`: $L_C$, likewise the mixed derivative $C$.
    - `outer_lipschitz`: $L_F$, likewise $\partial_p F$.
    - `direct_lipschitz`: $L_h$, likewise $\partial_h F$; 0 where the outer loss does not
        read `hyper`.
    - `cross_norm`: the largest singular value of $C$, or more. By default it is computed,
        for up to 512 outer variables.

    ??? cite "Source"

        Ehrhardt, Roberts: *Analyzing inexact hypergradients for bilevel learning*, 2023.
    """

    curvature: Constant
    hessian_lipschitz: Constant
    cross_lipschitz: Constant
    outer_lipschitz: Constant
    direct_lipschitz: Constant
    cross_norm: Constant | None
    is_bound: ClassVar[bool] = True

    def __init__(
        self,
        curvature: Constant,
        *,
        hessian_lipschitz: Constant,
        cross_lipschitz: Constant,
        outer_lipschitz: Constant,
        direct_lipschitz: Constant = 0.0,
        cross_norm: Constant | None = None,
    ):
        self.curvature = curvature
        self.hessian_lipschitz = hessian_lipschitz
        self.cross_lipschitz = cross_lipschitz
        self.outer_lipschitz = outer_lipschitz
        self.direct_lipschitz = direct_lipschitz
        self.cross_norm = cross_norm

    def __check_init__(self):
        for name, value in vars(self).items():
            if not (callable(value) or eqx.is_array(value)):
                check_tolerance(value, name, optional=name == "cross_norm")
        if isinstance(self.curvature, (int, float)) and self.curvature == 0:
            raise ValueError(
                "`curvature` must be positive; got 0. Without strong convexity there is no "
                "bound: use `metaopt.DualWeighted()`."
            )

    def __call__(self, here, linear, at, solve, hyper):
        if lx.positive_semidefinite_tag not in here.condition.tags:
            raise ValueError(
                "`StrongConvexity` bounds the error for an inner loss that is minimised. "
                "For fixed points and roots use `metaopt.DualWeighted()`."
            )
        curvature = constant(self.curvature, hyper)
        solution = tree_norm(linear.value)
        left = here.linear_residual(linear.value)
        if self.cross_norm is None:
            cross_norm = _cross_norm(here)
        else:
            cross_norm = constant(self.cross_norm, hyper)
        distance = tree_scaled_norm(here.residual) / curvature
        moved = constant(self.cross_lipschitz, hyper) * distance
        system = tree_norm(left) + distance * (
            constant(self.hessian_lipschitz, hyper) * solution
            + constant(self.outer_lipschitz, hyper)
        )
        bound = (
            constant(self.direct_lipschitz, hyper) * distance
            + moved * solution
            + (cross_norm + moved) * system / curvature
        )
        # What rounding adds; the bound itself is for exact arithmetic.
        eps = jnp.finfo(solution.dtype).eps
        rounding = 10 * eps * (tree_norm(here.direct) + cross_norm * solution)
        # Products are rounded too, and a Rayleigh quotient with them.
        smallest = here.smallest_curvature(linear, left)
        contradicted = smallest < curvature * (1 - 100 * eps**0.5)
        doubt = mask_result(contradicted, RESULTS.curvature_contradicted)
        return jnp.where(contradicted, jnp.inf, bound + rounding), doubt


def constant(value: Constant, hyper: Hyper) -> Any:
    """The number, at this `hyper`."""
    return value(hyper) if callable(value) else value


_MAX_COLUMNS = 512


def _cross_norm(here: Linearisation) -> FloatScalar:
    """The largest singular value of the mixed derivative, from all of its columns."""
    count = tree_size(here.hyper)
    if count > _MAX_COLUMNS:
        raise ValueError(
            f"`StrongConvexity` computes the norm of the mixed derivative for up to "
            f"{_MAX_COLUMNS} outer variables, and there are {count}. Give "
            "`cross_norm=...`, or use `metaopt.DualWeighted()`."
        )
    flat, unravel = ravel_pytree(here.hyper)

    def column(direction):
        along = lambda flat: here.condition(here.params, unravel(flat))
        moved = jax.jvp(along, (flat,), (direction,))[1]
        return ravel_pytree(moved)[0]

    columns = jax.vmap(column)(jnp.eye(count, dtype=flat.dtype))
    dtype = jnp.promote_types(columns.dtype, np.float32)
    columns = columns.astype(dtype)
    largest = jnp.linalg.eigvalsh(columns @ columns.T)[-1]
    slack = 1 + count * jnp.finfo(dtype).eps
    return jnp.sqrt(jnp.maximum(largest, 0)) * slack
