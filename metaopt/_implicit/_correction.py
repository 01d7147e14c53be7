"""One correction of an inner solution and of its linear system."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx

from .._core._tree import (
    divided,
    scale_and_norm,
    tree_add,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_scaled_norm,
    tree_sub,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._linear import (
    AbstractToleranceSolver,
    coarsest_eps,
    LinearSolution,
    Subspace,
    transposed as transposed_solver,
)
from ._error import Linearisation
from ._system import ImplicitSystem


_ROUGH = 0.01  # relative residuals for which a rough solver suffices


def lengths_beside(vector: Vector) -> Callable[[Vector], FloatScalar]:
    """A function that returns the norms of vectors no longer than this one by much."""
    size = tree_scaled_norm(vector)
    safe = jnp.where(size > 0, size, 1)
    return lambda other: safe * tree_norm(divided(other, safe))


class Corrected(NamedTuple):
    """A hypergradient after one correction of both systems.

    **Attributes:**

    - `there`: the linearisation at the corrected params.
    - `linear`: the corrected solution of the linear system.
    - `residual`: the norm of the optimality at the params before.
    - `left`: the norm of the right-hand side that the solution before left there.
    - `gradient`: the hypergradient from the two.
    - `with_old_solution`: the same with the solution of the linear system before.
    - `num_products`: the products that the correction took.
    - `min_curvature`: the smallest curvature that its solves met.
    - `indefinite`: whether a solve met negative curvature, beyond rounding, of an operator
        that is to be positive semidefinite. The point is then no minimum.
    """

    there: Linearisation
    linear: Vector
    residual: FloatScalar
    left: FloatScalar
    gradient: Vector
    with_old_solution: Vector
    num_products: IntScalar
    min_curvature: FloatScalar
    indefinite: BoolScalar

    def distance(self, gradient: Vector) -> FloatScalar:
        """The Euclidean distance from another hypergradient."""
        return lengths_beside(gradient)(tree_sub(self.gradient, gradient))


def corrected_once(
    here: Linearisation,
    base: Linearisation,
    w: Vector,
    knows: Subspace | None,
    at: Callable[[Vector], Linearisation],
    rtol: float,
    allowed: tuple[FloatScalar | None, FloatScalar | None] = (None, None),
) -> Corrected:
    """Correct both systems once, with the operator of `here`.

    **Arguments:**

    - `base`, `w`: what is corrected: the linearisation at some params, and the solution
        of the linear system.
    - `rtol`: the relative residual of each correction.
    - `allowed`: a residual that suffices as well, of each of the two, as a norm.
    """
    correct = lambda vector, transposed, allowed: _solved_roughly(
        here, vector, knows, transposed, rtol, allowed
    )
    step, residual, of_step = correct(base.system.residual, False, allowed[0])
    # A residual of exactly zero says that the params are as good as any.
    rounding = _one_rounding(base.system.params, residual > 0)
    there = at(tree_sub(base.system.params, tree_add(step, rounding)))
    left = there.linear_residual(w)
    change, size, of_change = correct(left, True, allowed[1])
    through_old, through_change = there.through_solution_both(w, change)
    old = tree_add(through_old, there.direct)
    count = of_step.num_products + of_change.num_products + 1
    smallest = jnp.minimum(of_step.min_curvature, of_change.min_curvature)
    return Corrected(
        there=there,
        linear=tree_add(w, change),
        residual=residual,
        left=size,
        gradient=tree_add(old, through_change),
        with_old_solution=old,
        num_products=count,
        min_curvature=smallest,
        indefinite=_is_negative(smallest, here, knows),
    )


def _is_negative(
    curvature: FloatScalar, here: Linearisation, knows: Subspace | None
) -> BoolScalar:
    """Whether a curvature is negative, and not by rounding of the largest known one."""
    if knows is None or lx.positive_semidefinite_tag not in here.system.condition.tags:
        return jnp.asarray(False)
    rounding = 100 * coarsest_eps(here.system.params) * knows.max_curvature
    return curvature < -rounding


def known_subspace(
    here: Linearisation, linear: LinearSolution
) -> tuple[Subspace | None, IntScalar | int]:
    """The directions whose products are known, and the number of products for that.

    They span the solution of the linear system. To first order, the outer loss changes by
    nothing along a correction that leaves no residual along this solution.
    """
    kept = linear.subspace
    if not here.system.is_symmetric:
        return None, 0
    if kept is not None and kept.holds_solution:
        return kept, 0
    stacked = lambda tree: jax.tree.map(lambda a: a[None], tree)
    product = here.system.operator.mv(linear.value)
    curvature = tree_dot(linear.value, product)
    own = Subspace(stacked(linear.value), stacked(product), curvature[None])
    if kept is None:
        return own, 1
    join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)])
    both = lambda a, b: jax.tree.map(join, a, b)
    # Last: a line search along it leaves nothing along it.
    return Subspace(
        both(kept.directions, own.directions),
        both(kept.products, own.products),
        join(kept.curvatures, own.curvatures),
    ), 1


def _solved_roughly(
    here: Linearisation,
    vector: Vector,
    knows: Subspace | None,
    transposed: bool,
    rtol: float,
    allowed: FloatScalar | None,
) -> tuple[Vector, FloatScalar, LinearSolution]:
    """A rough solution, the norm of the right-hand side, and the solve itself.

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
    # The new residual may be larger than the old one.
    tolerance = within / jnp.where(remaining > 0, remaining, 1)
    solution = solve_roughly(here.system, left, transposed, rtol, tolerance)
    value = solution.value if first is None else tree_add(first, solution.value)
    return tree_scale(scale, value), scale * size, solution


def solve_roughly(
    system: ImplicitSystem,
    vector: Vector,
    transposed: bool,
    rtol: float,
    tolerance: FloatScalar | None = None,
) -> LinearSolution:
    """Solve to another relative residual than that of the linear solver.

    **Arguments:**

    - `system`: the system, with its linear solver prepared.
    - `vector`, `transposed`: as for `ImplicitSystem.solve`.
    - `rtol`: the relative residual to solve to. A solver without tolerance ignores it.
    - `tolerance`: a relative residual that suffices where it is more.
    """
    solver, operator = system.linear_solver, system.operator
    if transposed and not system.is_symmetric:
        solver, operator = transposed_solver(solver), operator.transpose()
    if isinstance(solver, AbstractToleranceSolver):
        solver = solver.rough(rtol) if rtol >= _ROUGH else solver.with_rtol(rtol)
    solution = solver.solve(operator, vector, None, tolerance)
    if not (system.left_out or system.linear_solver.accepts_indefinite):
        return solution
    # Whoever asked for that, or for something to be left out, is not refused for it.
    infinite = jnp.full_like(solution.min_curvature, jnp.inf)
    return dataclasses.replace(solution, min_curvature=infinite)


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
