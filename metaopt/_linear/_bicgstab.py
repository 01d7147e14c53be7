"""Stabilised biconjugate gradients."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._core._results import RESULTS
from .._core._tree import (
    tree_axpy,
    tree_inner,
    tree_scale,
    tree_where,
    tree_zeros_like,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._core._validate import check_count
from ._base import (
    AbstractResidualSolver,
    check_square,
    check_structures,
    check_tolerances,
    how_it_ended,
    relative,
    reported,
)
from ._system import System


_CHECK_EVERY = 25  # steps of two products
_MOST_FAILED = 5  # restarts that gained nothing


class BiCGStab(AbstractResidualSolver):
    r"""Stabilised biconjugate gradients, for any square operator.

    Needs seven vectors of memory however many steps it takes, and two products in each of
    them. Use it where [`metaopt.GMRES`][] would need a longer cycle than fits in memory.
    Its residual goes up and down, and it can break down where GMRES does not. It then
    starts again from where it is, and where such a restart gains nothing, with the signs
    of the residual as its shadow residual. If five of them gain nothing, it fails: try
    [`metaopt.linear.NormalCG`][].

    The solve is successful once the true residual meets
    $\|b - A x\| \le rtol \|b\| + atol$, the norms being Euclidean.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of steps
        asked for by name is no failure. A tolerance below the precision of the vector is
        raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take, of two products each.

    ??? cite "Source"

        van der Vorst: *Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for
        the solution of nonsymmetric linear systems*, 1992.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=500, static=True)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")

    def check(self, operator):
        check_square("BiCGStab", operator)

    def solve(self, operator, vector, start=None, tolerance=None):
        # Not the method of `lineax`, which divides by zero where half a step solves the
        # system exactly, as for the identity.
        self.check(operator)
        check_structures(operator, vector, start)
        system = System(
            "BiCGStab", operator, vector, start, self.rtol, self.atol, tolerance
        )
        method = _Method(self, system)
        state = lax.while_loop(method.goes_on, method.round, method.init())
        series = state.series
        return reported(
            tree_scale(system.scale, series.x),
            method.result(state),
            relative(series.size, system.size),
            series.num_steps,
            state.num_products,
        )


class _Series(eqx.Module):
    """Steps in a row, in which the residual is updated and not computed."""

    x: Vector
    r: Vector
    p: Vector
    shadow: Vector
    size: FloatScalar  # the norm of r
    rho: FloatScalar  # shadow.r
    num_steps: IntScalar
    num_tries: IntScalar  # steps begun, each of two products
    goes_on: BoolScalar
    broken: BoolScalar  # a coefficient was zero
    nonfinite: BoolScalar


class _State(eqx.Module):
    """The state of the checks between the series."""

    series: _Series
    best: Vector  # the iterate of least residual
    best_size: FloatScalar
    restarted_size: FloatScalar  # the norm of the residual at the last restart
    num_worse: IntScalar  # steps since the best iterate
    num_failed: IntScalar  # restarts that gained nothing
    num_products: IntScalar
    running: BoolScalar
    converged: BoolScalar
    stagnated: BoolScalar


class _Method:
    """One solve: its constants and its rounds.

    A round is a series of textbook steps and then a check, which computes the residual
    and hands it to the next series. After a breakdown, and where the updated residual
    has lost the true one, the next series begins anew from there.
    """

    def __init__(self, solver: BiCGStab, system: System):
        self.solver = solver
        self.system = system
        self.max_worse = max(50, solver.max_steps // 4)

    def init(self) -> _State:
        none, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
        x, converged, finite = self.system.first_guess()
        zeros = tree_zeros_like(x)
        series = _Series(
            x=x,
            r=self.system.b,
            p=self.system.b,
            shadow=self.system.b,
            size=self.system.size,
            rho=self.system.size**2,
            num_steps=none,
            num_tries=none,
            goes_on=false,
            broken=false,
            nonfinite=~finite,
        )
        return _State(
            series=series,
            best=zeros,
            best_size=self.system.size,
            restarted_size=jnp.full((), jnp.inf, self.system.dtype),
            num_worse=none,
            num_failed=none,
            num_products=none,
            running=finite & ~converged,
            converged=converged,
            stagnated=false,
        )

    def goes_on(self, state: _State) -> BoolScalar:
        # A step is two products, and so is one that breaks down, each with one check
        # after it at most. The second half of this never decides.
        return state.running & (state.num_products < 6 * self.solver.max_steps + 7)

    def round(self, state: _State) -> _State:
        series = self.system.run_series(
            self.step, state.series, state.num_products, _CHECK_EVERY, self.solver.max_steps
        )
        return self.check(state, series)

    def step(self, c: _Series) -> _Series:
        # From r to s along p.
        v = self.system.product(c.p)
        shadow_v = tree_inner(c.shadow, v)
        shadow_size = jnp.sqrt(tree_inner(c.shadow, c.shadow))
        v_size = jnp.sqrt(tree_inner(v, v))
        first = jnp.abs(shadow_v) > self.system.eps * shadow_size * v_size
        alpha = c.rho / jnp.where(first, shadow_v, 1)
        s = tree_axpy(-alpha, v, c.r)

        # From s to r along s. If s is zero already, so is its product.
        t = self.system.product(s)
        square = tree_inner(t, t)
        omega = tree_inner(t, s) / jnp.where(square > 0, square, 1)
        r = tree_axpy(-omega, t, s)
        size = jnp.sqrt(tree_inner(r, r))
        taken = first & jnp.isfinite(size)
        x = tree_axpy(omega, s, tree_axpy(alpha, c.p, c.x))

        # The next direction.
        rho = tree_inner(c.shadow, r)
        second = (jnp.abs(rho) > self.system.eps * shadow_size * size) & (
            jnp.abs(omega) > 0
        )
        beta = (rho / c.rho) * (alpha / jnp.where(second, omega, 1))
        within = size <= self.system.tolerance
        return _Series(
            x=tree_where(taken, x, c.x),
            r=tree_where(taken, r, c.r),
            p=tree_axpy(beta, tree_axpy(-omega, v, c.p), r),
            shadow=c.shadow,
            size=jnp.where(taken, size, c.size),
            rho=rho,
            num_steps=c.num_steps + jnp.where(taken, 1, 0),
            num_tries=c.num_tries + 1,
            goes_on=taken & second & ~within,
            broken=~(taken & (second | within)),
            nonfinite=~jnp.isfinite(shadow_v) | (first & ~jnp.isfinite(size)),
        )

    def check(self, state: _State, series: _Series) -> _State:
        starts = series.num_steps == 0
        x, r, size = self.system.checked(series.x, starts)
        within = size <= self.system.tolerance
        better = size <= state.best_size
        num_steps = series.num_steps - state.series.num_steps
        num_worse = jnp.where(better, 0, state.num_worse + num_steps)

        # A series that ended before it gained anything will do so again, with the same
        # shadow. The signs of a residual are another one, which is not orthogonal to it.
        lost = (series.size <= self.system.tolerance) | ~(size <= 2 * series.size)
        restarts = starts | series.broken | lost
        failed = restarts & ~(size < 0.99 * state.restarted_size)
        num_failed = state.num_failed + failed
        again = failed & (num_failed >= _MOST_FAILED)
        shadow = tree_where(failed, jax.tree.map(jnp.sign, r), r)
        exhausted = series.num_steps >= self.solver.max_steps
        nonfinite = series.nonfinite | ~jnp.isfinite(size)
        fixed = self.solver.rtol is None
        stagnated = again if fixed else again | (num_worse >= self.max_worse)
        stops = within | nonfinite | exhausted | stagnated
        # Whoever asks for a number of steps gets the iterate after them.
        falls_back = stops & ~within & ~better & (nonfinite | stagnated | (not fixed))
        num_tries = series.num_tries
        series = _Series(
            x=tree_where(falls_back, state.best, x),
            r=r,
            p=tree_where(restarts, r, series.p),
            shadow=tree_where(restarts, shadow, series.shadow),
            size=jnp.where(falls_back, state.best_size, size),
            rho=jnp.where(restarts, tree_inner(shadow, r), series.rho),
            num_steps=series.num_steps,
            num_tries=jnp.zeros_like(series.num_tries),
            goes_on=series.goes_on,
            broken=jnp.zeros_like(series.broken),
            nonfinite=nonfinite,
        )
        return _State(
            series=series,
            best=tree_where(better, x, state.best),
            best_size=jnp.where(better, size, state.best_size),
            restarted_size=jnp.where(restarts, size, state.restarted_size),
            num_worse=num_worse,
            num_failed=num_failed,
            num_products=state.num_products + 2 * num_tries + 1,
            running=~stops,
            converged=within,
            stagnated=stagnated,
        )

    def result(self, state: _State) -> RESULTS:
        nonfinite, rtol = state.series.nonfinite, self.solver.rtol
        return how_it_ended(state.converged, nonfinite, state.stagnated, rtol)
