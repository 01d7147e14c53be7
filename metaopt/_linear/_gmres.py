"""Generalised minimal residuals."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._core._tree import (
    tree_add,
    tree_all_finite,
    tree_norm,
    tree_scale,
    tree_size,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._core._validate import check_count
from .._jaxpr._rewrite import carry_conditions
from ._base import (
    AbstractResidualSolver,
    check_square,
    check_structures,
    check_tolerances,
    how_it_ended,
    relative,
    reported,
)
from ._promotion import cast_up, in_auto_axes, promoted
from ._system import System


class GMRES(AbstractResidualSolver):
    r"""Generalised minimal residuals with restarts, for any square operator.

    Use it for fixed points and roots, whose operator is not symmetric. The residual never
    grows, but it can stop falling, which a longer cycle cures, or else
    [`metaopt.linear.NormalCG`][]. It keeps `restart` vectors in memory; for the Hessian of
    a loss at a minimum [`metaopt.CG`][] needs five, and fewer products, and for one that is
    not definite [`metaopt.linear.MINRES`][] needs seven.

    Each cycle of `restart` steps is one of `lineax.GMRES`, followed by a product that
    computes the true residual; the solve is successful once
    $\|b - A x\| \le rtol \|b\| + atol$, the norms being Euclidean.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of steps
        asked for by name is no failure. A tolerance below the precision of the vector is
        raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take, rounded up to whole cycles.
    - `restart`: the steps in a cycle. More of them converge in fewer products.

    ??? cite "Source"

        Saad, Schultz: *GMRES: a generalized minimal residual algorithm for solving
        nonsymmetric linear systems*, 1986.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=1000, static=True)
    restart: int = eqx.field(default=20, static=True)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")
        check_count(self.restart, "restart")

    def check(self, operator):
        check_square("GMRES", operator)

    def solve(self, operator, vector, start=None, tolerance=None):
        self.check(operator)
        check_structures(operator, vector, start)
        system = System("GMRES", operator, vector, start, self.rtol, self.atol, tolerance)
        restart = min(self.restart, self.max_steps, max(1, tree_size(vector)))
        max_cycles = math.ceil(self.max_steps / restart)
        one_cycle = _one_cycle(system.operator, vector, restart)

        def cycle(s: _CycleState) -> _CycleState:
            # The method knows absolute thresholds, hence a right-hand side of length 1.
            unit = tree_scale(1 / s.residual, s.r)
            change = tree_scale(s.residual, one_cycle(unit))
            x = tree_add(s.x, change)
            r = tree_sub(system.b, system.product(x))
            residual = tree_norm(r)
            singular = ~tree_all_finite(change) | ~jnp.isfinite(residual)
            better = ~singular & (residual < s.residual)
            converged = better & (residual <= system.tolerance)
            # A cycle that gains less than this would need a thousand others.
            stagnated = ~singular & ~converged & ~(residual < 0.99 * s.residual)
            num_cycles = s.num_cycles + 1
            return _CycleState(
                x=tree_where(better, x, s.x),
                r=tree_where(better, r, s.r),
                residual=jnp.where(better, residual, s.residual),
                num_cycles=num_cycles,
                running=~(singular | converged | stagnated),
                converged=converged,
                singular=singular,
                stagnated=stagnated,
            )

        s = _first_cycle_state(system)
        s = lax.while_loop(lambda s: s.running & (s.num_cycles < max_cycles), cycle, s)
        stagnated = s.stagnated & (self.rtol is not None)
        # A cycle has a product for each step, and two for residuals of its own.
        num_products = s.num_cycles * (restart + 3) + int(start is not None)
        return reported(
            tree_scale(system.scale, s.x),
            how_it_ended(s.converged, s.singular, stagnated, self.rtol),
            relative(s.residual, system.size),
            s.num_cycles * restart,
            num_products,
        )


class _CycleState(eqx.Module):
    x: Vector
    r: Vector
    residual: FloatScalar
    num_cycles: IntScalar
    running: BoolScalar
    converged: BoolScalar
    singular: BoolScalar
    stagnated: BoolScalar


def _first_cycle_state(system: System) -> _CycleState:
    b, size = system.b, system.size
    x, r, residual = tree_zeros_like(b), b, size
    if system.start is not None:
        left = tree_sub(b, system.product(system.start))
        remaining = tree_norm(left)
        # A start that is further from the solution than zero is not a help.
        useful = (remaining <= size) & (size > 0)
        x = tree_where(useful, system.start, x)
        r = tree_where(useful, left, r)
        residual = jnp.where(useful, remaining, residual)
    finite = jnp.isfinite(size)
    converged = (residual <= system.tolerance) | (residual == 0)
    return _CycleState(
        x=x,
        r=r,
        residual=residual,
        num_cycles=jnp.zeros((), jnp.int32),
        running=finite & ~converged,
        converged=finite & converged,
        singular=~finite,
        stagnated=jnp.asarray(False),
    )


def _one_cycle(operator: lx.AbstractLinearOperator, vector: Vector, restart: int):
    """One cycle of `lineax.GMRES` from zero, as a function of the right-hand side.

    It runs the method's own loop and not `lineax.linear_solve`, a primitive that would
    hide the loop from `carry_conditions`.
    """

    def one_cycle(unit: Vector) -> Vector:
        # The first of its steps only makes the residual of the start.
        method = lx.GMRES(rtol=0.0, atol=0.0, max_steps=2, restart=restart)

        def run(operator, unit):
            state = method.init(operator, {})
            compute = lambda unit: method.compute(state, unit, {})[0]
            return carry_conditions(compute)(unit), ()

        change, _ = in_auto_axes(run, promoted(operator, vector), cast_up(unit))
        return jax.tree.map(lambda a, b: a.astype(b.dtype), change, unit)

    return one_cycle
