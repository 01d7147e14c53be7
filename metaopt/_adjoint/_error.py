"""Bounds and estimates of the error of an implicit hypergradient."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from .._linear import LinearSolution, Subspace
from .._operators import cross_pullback
from .._results import first_failure, mask_result, RESULTS, where_result
from .._solver import Optimality
from .._tree import (
    divided,
    scale_and_norm,
    tree_add,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_scaled_norm,
    tree_size,
    tree_sub,
)
from .._types import Aux, BoolScalar, FloatScalar, Hyper, IntScalar, Vector
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

    def through_solution_both(self, first: Vector, second: Vector) -> tuple[Vector, Vector]:
        """`through_solution` of two vectors in one pass."""
        along = lambda h: self.condition(self.params, h)
        _, pullback = jax.vjp(along, self.hyper)
        stacked = jax.tree.map(lambda a, b: jnp.stack([-a, -b]), first, second)
        (both,) = jax.vmap(pullback)(stacked)
        pick = lambda index: jax.tree.map(lambda leaf: leaf[index], both)
        return pick(0), pick(1)

    def gradient(self, linear_solution: Vector) -> Vector:
        """The hypergradient, from the solution of the linear system."""
        return tree_add(self.through_solution(linear_solution), self.direct)

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
        size = tree_norm(linear.value)
        unit = divided(linear.value, jnp.where(size > 0, size, 1))
        along = tree_dot(unit, tree_sub(self.in_params, left))
        quotient = jnp.where(size > 0, along / jnp.where(size > 0, size, 1), jnp.inf)
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
    - `result`: whether an assumption of the estimate is contradicted.
    """

    error: FloatScalar
    linear_share: FloatScalar
    num_products: IntScalar
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


class DualWeighted(AbstractErrorEstimate):
    r"""Estimate the error of the hypergradient by correcting it.

    A Newton step from the inner solution and one more solve for the remaining right-hand
    side of the linear system give a better hypergradient. Its difference from the one in
    question estimates the error of the latter. The two corrections are solved to a rough
    tolerance and start from what the solution of the linear system already knows of the
    inverse, so that they cost a fraction of the products of that solve. Not a bound.

    A [`metaopt.GaussNewton`][] operator is used to solve for the corrections, and the
    residuals are those of the exact Jacobian. The estimate is as rough as the operator.

    **Arguments:**

    - `rtol`: the relative residual to which each of the two corrections is solved.

    ??? cite "Source"

        Becker, Rannacher: *An optimal control approach to a posteriori error estimation
        in finite element methods*, 2001, applied to both systems.
    """

    rtol: float = eqx.field(default=0.3, static=True)
    is_bound: ClassVar[bool] = False

    def __check_init__(self):
        check_tolerance(self.rtol, "rtol", optional=False)
        if not 0 < self.rtol < 1:
            raise ValueError(
                f"`rtol` must lie between 0 and 1, being relative; got {self.rtol!r}."
            )

    def __call__(self, here, linear, gradient, at, solve, hyper):
        w = linear.value
        knows, asked = _subspace(here, linear)
        better = _improved(here, here, w, knows, at, solve, self.rtol)
        old, new = better.with_old_solution, better.gradient
        length = _lengths_beside(gradient)
        # The two parts of the correction can cancel by chance, and their own errors do not.
        # The residual that the Newton step leaves tells how large these are.
        parts = length(tree_sub(old, gradient)) + length(tree_sub(new, old))
        before = jnp.where(better.residual > 0, better.residual, 1)
        after = tree_norm(divided(better.there.residual, before))
        error = length(tree_sub(new, gradient))
        error = error + _OF_PARTS * jnp.minimum(after, 1) * parts
        floor = jnp.finfo(error.dtype).eps * length(new)
        unsolved = linear.residual * tree_norm(here.in_params)
        share = unsolved / jnp.where(better.left > 0, better.left, 1)
        num_products = asked + better.num_products
        return ErrorEstimate(error + floor, share, num_products, first_failure())


def _lengths_beside(vector: Vector) -> Callable[[Vector], FloatScalar]:
    """A function that returns the norms of vectors no longer than this one by much."""
    size = tree_scaled_norm(vector)
    safe = jnp.where(size > 0, size, 1)
    return lambda other: safe * tree_norm(divided(other, safe))


class _Better(NamedTuple):
    """A hypergradient after one correction of both systems.

    **Attributes:**

    - `there`: the linearisation at the corrected params.
    - `linear`: the corrected solution of the linear system.
    - `residual`: the norm of the optimality at the params before.
    - `left`: the norm of the right-hand side that the solution before left there.
    - `gradient`: the hypergradient from the two.
    - `with_old_solution`: the same with the solution of the linear system before.
    - `num_products`: the products that the correction took.
    """

    there: Linearisation
    linear: Vector
    residual: FloatScalar
    left: FloatScalar
    gradient: Vector
    with_old_solution: Vector
    num_products: IntScalar

    def distance(self, gradient: Vector) -> FloatScalar:
        """The Euclidean distance from another hypergradient."""
        return _lengths_beside(gradient)(tree_sub(self.gradient, gradient))


def _improved(
    here: Linearisation,
    base: Linearisation,
    w: Vector,
    knows: Subspace | None,
    at: Callable[[Vector], Linearisation],
    solve: Solve,
    rtol: float,
    allowed: tuple[FloatScalar | None, FloatScalar | None] = (None, None),
) -> _Better:
    """Correct both systems once, with the operator of `here`.

    **Arguments:**

    - `base`, `w`: what is corrected: the linearisation at some params, and the solution
        of the linear system.
    - `rtol`: the relative residual of each correction.
    - `allowed`: a residual that suffices as well, of each of the two, as a norm.
    """
    correct = lambda vector, transposed, allowed: _corrected(
        here, vector, knows, solve, transposed, rtol, allowed
    )
    step, residual, first = correct(base.residual, False, allowed[0])
    # A residual of exactly zero says that the params are as good as any.
    rounding = _one_rounding(base.params, residual > 0)
    there = at(tree_sub(base.params, tree_add(step, rounding)))
    left = there.linear_residual(w)
    change, size, second = correct(left, True, allowed[1])
    through_old, through_change = there.through_solution_both(w, change)
    old = tree_add(through_old, there.direct)
    new, count = tree_add(old, through_change), first + second + 1
    return _Better(there, tree_add(w, change), residual, size, new, old, count)


def _subspace(here: Linearisation, linear: LinearSolution) -> tuple[Subspace | None, int]:
    """The directions whose products are known, those that were kept or the solution, and
    how many products were asked for."""
    if lx.symmetric_tag not in here.condition.tags:
        return None, 0
    if linear.subspace is not None:
        return linear.subspace, 0
    stacked = lambda tree: jax.tree.map(lambda a: a[None], tree)
    product = here.operator.mv(linear.value)
    curvature = tree_dot(linear.value, product)
    return Subspace(stacked(linear.value), stacked(product), curvature[None]), 1


def _corrected(
    here: Linearisation,
    vector: Vector,
    knows: Subspace | None,
    solve: Solve,
    transposed: bool,
    rtol: float,
    allowed: FloatScalar | None,
) -> tuple[Vector, FloatScalar, IntScalar]:
    """A rough solution, the norm of the right-hand side, and the products.

    It begins in the directions whose products are known, and goes on for what those
    leave.
    """
    scale, size = scale_and_norm(vector)
    first, left = None, divided(vector, scale)
    if knows is not None:
        first, left = knows.solve(left)
    remaining, within = tree_norm(left), rtol * size
    if allowed is not None:
        within = jnp.maximum(within, allowed.astype(within.dtype) / scale)
    # What is left may be larger than what it is left of.
    tolerance = within / jnp.where(remaining > 0, remaining, 1)
    solution = solve(here, left, transposed=transposed, rtol=rtol, tolerance=tolerance)
    value = solution.value if first is None else tree_add(first, solution.value)
    return tree_scale(scale, value), scale * size, solution.num_products


def _one_rounding(params: Vector, uncertain: BoolScalar) -> Vector:
    """A change of the params by one unit of rounding, with signs as if random, or none."""

    def change(a, sign):
        eps = jnp.where(uncertain, float(jnp.finfo(a.dtype).eps), 0.0).astype(a.dtype)
        return eps * a * sign

    return jax.tree.map(change, params, random_signs(params))


def random_signs(like: Vector) -> Vector:
    """Numbers that are 1 or -1 without a pattern, the same at every call.

    A bit of a multiplicative hash of the indices (Knuth), which compiles to next to
    nothing.
    """

    def signs(a):
        number = jnp.full(a.shape, 2654435769, jnp.uint32)
        for axis in range(a.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
            number = (number ^ index) * jnp.uint32(2654435769)
        bit = (number >> 16) & jnp.uint32(1)
        return 1 - 2 * bit.astype(a.dtype)

    return jax.tree.map(signs, like)


Constant = float | jax.Array | Callable[[Hyper], Any]
"""A number, or a function of `hyper` that returns one."""


class StrongConvexity(AbstractErrorEstimate):
    r"""Bound the error of the hypergradient of a strongly convex inner problem.

    Both systems are corrected as for [`metaopt.DualWeighted`][], and the remainder is
    bounded. With inner residual $r$ and curvature $\mu$ the corrected inner solution is
    within $\epsilon = \|r\| / \mu$ of the exact one. For the corrected solution $w$ of the
    linear system $A w = b$, with $b = \partial_p F$ and residual $\rho$, and
    $C = \partial_h \nabla_p L$, the error of the corrected hypergradient is at most

    $$L_h \epsilon + L_C \epsilon \|w\| + \frac{\|C\| + L_C \epsilon}{\mu}
    \left( \|\rho\| + L_A \epsilon \|w\| + L_F \epsilon \right).$$

    Its distance from the hypergradient in question is added. The corrections are solved
    until the remainder is a part of that distance, so that the bound is close to the error.

    A certificate in exact arithmetic, as long as the constants are right: they are yours
    to know, along the way from the solution that was found to the exact one. Use
    [`metaopt.DualWeighted`][] where they are not known.

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

    def __call__(self, here, linear, gradient, at, solve, hyper):
        if lx.positive_semidefinite_tag not in here.condition.tags:
            raise ValueError(
                "`StrongConvexity` bounds the error for an inner loss that is minimised. "
                "For fixed points and roots use `metaopt.DualWeighted()`."
            )
        curvature = constant(self.curvature, hyper)
        (knows, asked), first = _subspace(here, linear), here.linear_residual(linear.value)
        rough = _improved(here, here, linear.value, knows, at, solve, _ROUGH)
        # The residuals of the second correction need be no smaller than this: then what
        # they leave is no more than a part of the error itself.
        there, error = rough.there, rough.distance(gradient)
        of_inner, of_linear = self._factors(there, rough.linear, hyper)
        allowed = _PART * error / of_inner, _PART * error / of_linear
        least = 10 * float(jnp.finfo(error.dtype).eps)
        better = _improved(here, there, rough.linear, knows, at, solve, least, allowed)
        there, error = better.there, better.distance(gradient)
        of_inner, of_linear = self._factors(there, better.linear, hyper)
        left = there.linear_residual(better.linear)
        bound = (
            error
            + of_inner * tree_scaled_norm(there.residual)
            + of_linear * tree_scaled_norm(left)
        )
        # What rounding adds; the bound itself is for exact arithmetic.
        solution = tree_norm(linear.value)
        eps = jnp.finfo(solution.dtype).eps
        size = tree_norm(here.direct) + self._cross_norm(here, hyper) * solution
        # Products are rounded too, and a Rayleigh quotient with them.
        smallest = here.smallest_curvature(linear, first)
        contradicted = smallest < curvature * (1 - 100 * eps**0.5)
        bound = jnp.where(contradicted, jnp.inf, bound + 10 * eps * size)
        num_products = asked + rough.num_products + better.num_products + 2
        doubt = mask_result(contradicted, RESULTS.curvature_contradicted)
        share = tree_norm(first) / jnp.where(rough.left > 0, rough.left, 1)
        return ErrorEstimate(bound, share, num_products, doubt)

    def _factors(
        self, at: Linearisation, w: Vector, hyper: Hyper
    ) -> tuple[FloatScalar, FloatScalar]:
        """The factors of the norms of the two residuals in the bound."""
        number = lambda value: constant(value, hyper)
        curvature, solution = number(self.curvature), tree_norm(w)
        distance = tree_scaled_norm(at.residual) / curvature
        moved = number(self.cross_lipschitz) * distance
        of_linear = (self._cross_norm(at, hyper) + moved) / curvature
        system = number(self.hessian_lipschitz) * solution + number(self.outer_lipschitz)
        slope = number(self.direct_lipschitz) + number(self.cross_lipschitz) * solution
        return (slope + of_linear * system) / curvature, of_linear

    def _cross_norm(self, at: Linearisation, hyper: Hyper) -> FloatScalar:
        if self.cross_norm is None:
            return _cross_norm(at)
        return jnp.asarray(constant(self.cross_norm, hyper))


def constant(value: Constant, hyper: Hyper) -> Any:
    """The number, at this `hyper`."""
    return value(hyper) if callable(value) else value


_OF_PARTS = 0.5
_ROUGH = 0.3
_PART = 0.5
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
