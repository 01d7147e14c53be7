"""Methods that minimise the residual, and the rounds in which they are run."""

import abc
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._core._results import RESULTS
from .._core._tree import (
    tree_axpy,
    tree_scale,
    tree_where,
    tree_zeros_like,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._core._validate import check_count
from ._base import (
    AbstractResidualSolver,
    check_structures,
    check_tolerances,
    how_it_ended,
    relative,
    reported,
)
from ._system import System


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


_CHECK_EVERY = 50  # products
_MAX_FLAT = 4  # checks in a row without progress


class Step(eqx.Module):
    """One step of a method, from an iterate with the residual $r$.

    **Attributes:**

    - `recurrence`: what the next step needs.
    - `direction`, `length`: the iterate moves by `length * direction`.
    - `size`: the norm of the residual after that, as the recurrence has it.
    - `slope`: $|A^T r| / |r|$. It is zero where the residual can fall no further.
    - `stretch`: an estimate of the norm of $A$ from below.
    - `curvature`: $r^T A r / r^T r$; infinite where the method does not know it.
    """

    recurrence: Any
    direction: Vector
    length: FloatScalar
    size: FloatScalar
    slope: FloatScalar
    stretch: FloatScalar
    curvature: FloatScalar


class AbstractMinimalResidual(AbstractResidualSolver):
    """A Krylov method whose residual never grows, and stops falling only where it is
    least.

    It is run until the *true* residual is small enough. That is computed every 50
    products and before it is believed; where it has lost the one of the recurrence, the
    method begins anew from there, which refines the solution.
    """

    atol: eqx.AbstractVar[float]
    _products_per_step: AbstractClassVar[int]

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")

    @abc.abstractmethod
    def _begin(self, system: System, r: Vector, size: FloatScalar) -> Any:
        """The arrays that the first step from an iterate needs.

        **Arguments:**

        - `system`: what is solved.
        - `r`, `size`: the residual of the iterate, and its norm.
        """

    @abc.abstractmethod
    def _step(self, system: System, recurrence: Any, size: FloatScalar) -> Step:
        """The next step, by `_products_per_step` products.

        **Arguments:**

        - `system`: what is solved.
        - `recurrence`: what the step before, or `_begin`, left.
        - `size`: the norm of the residual, as the recurrence has it.
        """

    def solve(self, operator, vector, start=None, tolerance=None):
        self.check(operator)
        check_structures(operator, vector, start)
        name = type(self).__name__
        system = System(name, operator, vector, start, self.rtol, self.atol, tolerance)
        rounds = _Rounds(self, system)
        state = lax.while_loop(rounds.goes_on, rounds.round, rounds.init())
        return reported(
            tree_scale(system.scale, state.series.x),
            rounds.result(state),
            relative(state.residual, system.size),
            state.series.num_steps,
            state.num_products,
            state.series.min_curvature,
        )


class _Series(eqx.Module):
    """Steps in a row, in which the residual is updated and not computed."""

    x: Vector
    size: FloatScalar  # the norm of the residual
    recurrence: Any
    largest: FloatScalar  # the largest stretch
    min_curvature: FloatScalar
    num_steps: IntScalar
    num_tries: IntScalar  # steps since the check, the one not taken included
    goes_on: BoolScalar
    looked: BoolScalar  # there was a check where the slope became small
    singular: BoolScalar  # the residual can fall no further
    nonfinite: BoolScalar


class _State(eqx.Module):
    """The state of the checks between the series."""

    series: _Series
    residual: FloatScalar  # the norm of b - A x
    best: Vector  # the iterate of least residual
    best_residual: FloatScalar
    num_products: IntScalar
    num_flat: IntScalar  # checks in a row without progress
    running: BoolScalar
    converged: BoolScalar
    stagnated: BoolScalar


class _Rounds:
    """One solve: its constants and its rounds.

    A round is a series of steps as in the paper and then a check.
    """

    def __init__(self, solver: AbstractMinimalResidual, system: System):
        self.solver = solver
        self.system = system

    def init(self) -> _State:
        b, size = self.system.b, self.system.size
        zero, infinite = jnp.zeros_like(size), jnp.full_like(size, jnp.inf)
        none, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
        x, converged, finite = self.system.first_guess()
        series = _Series(
            x=x,
            size=size,
            recurrence=self.solver._begin(self.system, b, size),
            largest=zero,
            min_curvature=infinite,
            num_steps=none,
            num_tries=none,
            goes_on=false,
            looked=false,
            singular=false,
            nonfinite=~finite,
        )
        return _State(
            series=series,
            residual=size,
            best=tree_zeros_like(x),
            best_residual=size,
            num_products=none,
            num_flat=none,
            running=finite & ~converged,
            converged=converged,
            stagnated=false,
        )

    def goes_on(self, state: _State) -> BoolScalar:
        # A check comes after a step, taken or not, or looks at the start; and one that
        # is not taken ends the solve, or else the next is. The second half of this
        # never decides.
        most = 2 * (self.solver._products_per_step + 1) * (self.solver.max_steps + 2)
        return state.running & (state.num_products < most)

    def round(self, state: _State) -> _State:
        every = max(1, _CHECK_EVERY // self.solver._products_per_step)
        series = self.system.run_series(
            self.step, state.series, state.num_products, every, self.solver.max_steps
        )
        return self.check(state, series)

    def step(self, s: _Series) -> _Series:
        step = self.solver._step(self.system, s.recurrence, s.size)
        # The gradient of |r|^2 / 2 is -A^T r. Below one unit of rounding its size cannot
        # be told from zero: what is left of the residual is not in the range of A.
        # Rounding can keep the slope from getting there: that of MINRES may go down to
        # the square root of it, where the iterate is as good as it gets, and up again
        # while the iterate grows without bound along the kernel of A. So there is a
        # check before the first step of so small a slope, and then it goes on.
        largest = jnp.maximum(s.largest, step.stretch)
        finite = jnp.isfinite(step.length) & jnp.isfinite(step.size)
        regular = step.slope > self.system.eps * largest
        small = step.slope <= 10 * self.system.eps**0.5 * largest
        taken = finite & regular & ~(small & ~s.looked)
        x = tree_axpy(step.length, step.direction, s.x)
        return _Series(
            x=tree_where(taken, x, s.x),
            size=jnp.where(taken, step.size, s.size),
            recurrence=tree_where(taken, step.recurrence, s.recurrence),
            largest=largest,
            min_curvature=jnp.where(
                finite, jnp.minimum(s.min_curvature, step.curvature), s.min_curvature
            ),
            num_steps=s.num_steps + jnp.where(taken, 1, 0),
            num_tries=s.num_tries + 1,
            goes_on=taken & ~(step.size <= self.system.tolerance),
            looked=s.looked | small,
            singular=finite & ~regular,
            nonfinite=~finite,
        )

    def check(self, state: _State, series: _Series) -> _State:
        starts = series.num_steps == 0
        x, r, size = self.system.checked(series.x, starts)
        within = size <= self.system.tolerance
        better = size <= state.best_residual
        claimed = series.size <= self.system.tolerance
        lost = claimed | ~(size <= 2 * series.size)

        # At the level of rounding neither more steps nor a restart lower the residual.
        # Steps from a small slope get one try, because on a singular system they only lead
        # away.
        lower = size < (1 - 100 * self.system.eps) * state.best_residual
        num_flat = jnp.where(lower | starts, 0, state.num_flat + 1)
        astray = state.series.looked & (num_flat > 0)
        nonfinite = series.nonfinite | ~jnp.isfinite(size)
        broken = series.singular | nonfinite
        exhausted = series.num_steps >= self.solver.max_steps
        if self.solver.rtol is None:
            begins, stagnated = starts, jnp.asarray(False)
            stops = within | broken | exhausted | claimed
        else:
            begins = starts | lost
            stagnated = astray | (num_flat >= _MAX_FLAT)
            stops = within | broken | exhausted | stagnated
        falls_back = stops & ~within & ~better
        new = self.solver._begin(self.system, r, size)
        num_products = self.solver._products_per_step * series.num_tries + 1
        series = _Series(
            x=tree_where(falls_back, state.best, x),
            size=jnp.where(begins, size, series.size),
            recurrence=tree_where(begins, new, series.recurrence),
            largest=series.largest,
            min_curvature=series.min_curvature,
            num_steps=series.num_steps,
            num_tries=jnp.zeros_like(series.num_tries),
            goes_on=series.goes_on,
            looked=series.looked & ~begins,
            singular=series.singular,
            nonfinite=nonfinite,
        )
        return _State(
            series=series,
            residual=jnp.where(falls_back, state.best_residual, size),
            best=tree_where(better, x, state.best),
            best_residual=jnp.where(better, size, state.best_residual),
            num_products=state.num_products + num_products,
            num_flat=num_flat,
            running=~stops,
            converged=within,
            stagnated=stagnated,
        )

    def result(self, state: _State) -> RESULTS:
        stagnated = state.stagnated | state.series.singular
        nonfinite, rtol = state.series.nonfinite, self.solver.rtol
        return how_it_ended(state.converged, nonfinite, stagnated, rtol)


def unit(x: Vector, size: FloatScalar) -> Vector:
    """`x / size`, where `size` is its norm; divided in the dtype of `size`, which half
    precision need not hold."""
    divisor = or_one(size)
    return jax.tree.map(lambda a: (a.astype(size.dtype) / divisor).astype(a.dtype), x)


def or_one(size: FloatScalar) -> FloatScalar:
    """`size`, or 1 where it is zero: something to divide by."""
    return jnp.where(size > 0, size, 1)
