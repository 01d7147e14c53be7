"""A bound on the error of an implicit hypergradient, from constants."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from .._core._results import mask_result, RESULTS
from .._core._tree import (
    tree_scaled_norm,
    tree_size,
)
from .._core._types import FloatScalar, Hyper, Vector
from .._core._validate import check_tolerance
from ._correction import corrected_once, known_subspace
from ._error import AbstractErrorEstimate, ErrorEstimate, Linearisation
from ._system import ImplicitSystem


Constant = float | jax.Array | Callable[[Hyper], Any]
"""A number, or a function of `hyper` that returns one."""


class StrongConvexity(AbstractErrorEstimate):
    r"""Bound the error of the hypergradient of a strongly convex inner problem.

    Both systems are corrected as for [`metaopt.accuracy.DualWeighted`][], and the remainder
    is bounded. With inner residual $r$ and curvature $\mu$ the corrected inner solution is
    within $\epsilon = \|r\| / \mu$ of the exact one. For the corrected solution $w$ of the
    linear system $A w = b$, with $b = \partial_p F$ and residual $\rho$, and $C =
    \partial_h \nabla_p L$, the error of the corrected hypergradient is at most

    $$L_h \epsilon + L_C \epsilon \|w\| + \frac{\|C\| + L_C \epsilon}{\mu}
    \left( \|\rho\| + L_A \epsilon \|w\| + L_F \epsilon \right).$$

    Its distance from the hypergradient in question is added. The corrections are solved
    until the remainder is a part of that distance, so that the bound is close to the error.

    A certificate in exact arithmetic, as long as the constants are right: they are yours
    to know, along the way from the solution that was found to the exact one. Use
    [`metaopt.accuracy.DualWeighted`][] where they are not known.

    **Arguments:** each is a number, or a function of `hyper`.

    - `curvature`: $\mu > 0$, the least eigenvalue of the Hessian of the inner loss, or
        less. The result says so if the linear solver meets a smaller one.
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
                "bound: use `metaopt.accuracy.DualWeighted()`."
            )

    def __call__(self, here, linear, gradient, at, hyper):
        if lx.positive_semidefinite_tag not in here.system.condition.tags:
            raise ValueError(
                "`StrongConvexity` bounds the error for an inner loss that is minimised. "
                "For fixed points and roots use `metaopt.accuracy.DualWeighted()`."
            )
        curvature = constant(self.curvature, hyper)
        knows, asked = known_subspace(here, linear)
        first = here.linear_residual(linear.value)
        rough = corrected_once(here, here, linear.value, knows, at, _ROUGH)
        # The residuals of the second correction need be no smaller than this: then what
        # they leave is no more than a part of the error itself.
        there, error = rough.there, rough.distance(gradient)
        of_inner, of_linear = self._factors(there, rough.linear, hyper)
        allowed = _PART * error / of_inner, _PART * error / of_linear
        least = 10 * float(jnp.finfo(error.dtype).eps)
        better = corrected_once(here, there, rough.linear, knows, at, least, allowed)
        there, error = better.there, better.distance(gradient)
        of_inner, of_linear = self._factors(there, better.linear, hyper)
        left = there.linear_residual(better.linear)
        bound = (
            error
            + of_inner * tree_scaled_norm(there.system.residual)
            + of_linear * tree_scaled_norm(left)
        )
        # The effect of rounding; the bound itself is for exact arithmetic.
        solution = tree_scaled_norm(linear.value)
        eps = jnp.finfo(solution.dtype).eps
        size = tree_scaled_norm(here.direct) + self._cross_norm(here, hyper) * solution
        # Products are rounded too, and a Rayleigh quotient with them.
        smallest = here.smallest_curvature(linear, first)
        contradicted = smallest < curvature * (1 - 100 * eps**0.5)
        contradicted |= jnp.asarray(curvature <= 0) | rough.indefinite | better.indefinite
        bound = jnp.where(contradicted, jnp.inf, bound + 10 * eps * size)
        num_products = asked + rough.num_products + better.num_products + 2
        doubt = mask_result(contradicted, RESULTS.curvature_contradicted)
        share = tree_scaled_norm(first) / jnp.where(rough.left > 0, rough.left, 1)
        met = jnp.minimum(rough.min_curvature, better.min_curvature)
        return ErrorEstimate(bound, share, num_products, met, doubt)

    def _factors(
        self, at: Linearisation, w: Vector, hyper: Hyper
    ) -> tuple[FloatScalar, FloatScalar]:
        """The factors of the norms of the two residuals in the bound."""
        number = lambda value: constant(value, hyper)
        curvature, solution = number(self.curvature), tree_scaled_norm(w)
        distance = tree_scaled_norm(at.system.residual) / curvature
        moved = number(self.cross_lipschitz) * distance
        of_linear = (self._cross_norm(at, hyper) + moved) / curvature
        system = number(self.hessian_lipschitz) * solution + number(self.outer_lipschitz)
        slope = number(self.direct_lipschitz) + number(self.cross_lipschitz) * solution
        return (slope + of_linear * system) / curvature, of_linear

    def _cross_norm(self, at: Linearisation, hyper: Hyper) -> FloatScalar:
        if self.cross_norm is None:
            return _cross_norm(at.system)
        return jnp.asarray(constant(self.cross_norm, hyper))


def constant(value: Constant, hyper: Hyper) -> Any:
    """The number, at this `hyper`."""
    return value(hyper) if callable(value) else value


_ROUGH = 0.3  # the relative residual of the first correction
_PART = 0.5  # of the error, that the second correction may leave
_MAX_COLUMNS = 512


def _cross_norm(system: ImplicitSystem) -> FloatScalar:
    """The largest singular value of the mixed derivative, from all of its columns."""
    count = tree_size(system.hyper)
    if count > _MAX_COLUMNS:
        raise ValueError(
            f"`StrongConvexity` computes the norm of the mixed derivative for up to "
            f"{_MAX_COLUMNS} outer variables, and there are {count}. Give "
            "`cross_norm=...`, or use `metaopt.accuracy.DualWeighted()`."
        )
    flat, unravel = ravel_pytree(system.hyper)

    column = lambda direction: ravel_pytree(system.cross(unravel(direction)))[0]
    columns = jax.vmap(column)(jnp.eye(count, dtype=flat.dtype))
    dtype = jnp.promote_types(columns.dtype, np.float32)
    columns = columns.astype(dtype)
    largest = jnp.linalg.eigvalsh(jnp.matmul(columns, columns.T, precision="highest"))[-1]
    slack = 1 + count * jnp.finfo(dtype).eps
    return jnp.sqrt(jnp.maximum(largest, 0)) * slack
