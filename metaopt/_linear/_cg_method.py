"""The method of conjugate gradients: series of steps, and checks between them."""

import dataclasses
from typing import Any, Protocol

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import (
    same_structs,
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_put,
    tree_rooms,
    tree_structs,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from ._base import (
    out_of_steps,
    Subspace,
)
from ._preconditioner import AbstractPreconditioner
from ._system import System


_CHECK_EVERY = 50
_MAX_FLAT = 4  # checks in a row without progress


class Settings(Protocol):
    """The settings of [`metaopt.CG`][]."""

    @property
    def rtol(self) -> float | None: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def damping(self) -> float: ...
    @property
    def preconditioner(self) -> Any: ...
    @property
    def num_kept(self) -> int: ...


class Series(eqx.Module):
    """Steps in a row, in which the residual is updated and not computed."""

    x: Vector
    r: Vector  # the residual of the damped system
    p: Vector
    square: FloatScalar  # r.r
    gamma: FloatScalar  # r.M r of the step before; infinite: forget its direction
    p_size: FloatScalar  # p.M^-1 p
    max_ratio: FloatScalar  # the largest p.A p / p.M^-1 p
    min_curvature: FloatScalar
    num_steps: IntScalar
    kept: Subspace | None
    goes_on: BoolScalar
    indefinite: BoolScalar
    bad_preconditioner: BoolScalar
    nonfinite: BoolScalar


class State(eqx.Module):
    """The state of the checks between the series."""

    series: Series
    residual: FloatScalar  # the norm of b - A x
    best: Vector  # the iterate of least energy
    best_energy: FloatScalar
    best_residual: FloatScalar
    least_size: FloatScalar  # the least norm of a computed residual
    failed_size: FloatScalar  # ... where it last contradicted the updated one
    num_products: IntScalar
    num_flat: IntScalar  # checks in a row without progress
    running: BoolScalar
    converged: BoolScalar
    stagnated: BoolScalar


class Method:
    """One solve: its constants and its rounds.

    A round is a series of textbook steps and then a check, which computes the residual
    and hands it to the next series. Only a check looks at anything but scalars and the
    three vectors of the method.

    Iterates are compared by their energy x.A x / 2 - b.x, which every step lowers, as
    it does the distance to the solution (Hestenes and Stiefel, theorem 6:3). The
    residual goes up first on an ill-conditioned system, where for a long time zero is
    the iterate of least residual.
    """

    def __init__(self, solver: Settings, system: System):
        self.solver = solver
        self.system = system
        self.damping = jnp.asarray(solver.damping, system.dtype)

    def damped(self, x: Vector, product: Vector) -> Vector:
        return tree_axpy(self.damping, x, product) if self.solver.damping else product

    def precondition(self, r: Vector) -> Vector:
        preconditioner = self.solver.preconditioner
        if preconditioner is None:
            return r
        assert not isinstance(preconditioner, AbstractPreconditioner)
        if isinstance(preconditioner, lx.AbstractLinearOperator):
            z = preconditioner.mv(r)
        else:
            z = preconditioner(r)
        if not same_structs(z, r):
            raise ValueError(
                "`preconditioner` must return a vector like the one that it is given, "
                f"{tree_structs(r)}; it returned {tree_structs(z)}."
            )
        return z

    def nothing_kept(self) -> Subspace | None:
        count = self.solver.num_kept
        if count == 0:
            return None
        rooms = tree_rooms(self.system.b, count)
        from_zero = self.system.start is None
        return Subspace(rooms, rooms, jnp.zeros(count, self.system.dtype), from_zero)

    def keep(self, s: Series, taken, p: Vector, product: Vector, curvature):
        """The last directions, one more of which was found."""
        if s.kept is None:
            return None
        slot = s.num_steps % self.solver.num_kept
        return Subspace(
            tree_put(s.kept.directions, slot, p),
            tree_put(s.kept.products, slot, product),
            s.kept.curvatures.at[slot].set(jnp.where(taken, curvature, 0)),
            s.kept.holds_solution,
        )

    def init(self) -> State:
        zero, infinite = (
            jnp.zeros((), self.system.dtype),
            jnp.full((), jnp.inf, self.system.dtype),
        )
        none, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
        x, converged, finite = self.system.first_guess()
        zeros = tree_zeros_like(x)
        series = Series(
            x=x,
            r=self.system.b,
            p=zeros,
            square=self.system.size**2,
            gamma=infinite,
            p_size=zero,
            max_ratio=zero,
            min_curvature=infinite,
            num_steps=none,
            kept=self.nothing_kept(),
            goes_on=false,
            indefinite=false,
            bad_preconditioner=false,
            nonfinite=~finite,
        )
        return State(
            series=series,
            residual=self.system.size,
            best=zeros,
            best_energy=zero,
            best_residual=self.system.size,
            least_size=infinite,
            failed_size=infinite,
            num_products=none,
            num_flat=none,
            running=finite & ~converged,
            converged=converged,
            stagnated=false,
        )

    def run(self) -> State:
        """All rounds. A few steps that were asked for by number are a series alone, which
        nothing interrupts, so that the check after it is no part of the solution."""
        state = self.init()
        if not self.is_one_series:
            return lax.while_loop(self.goes_on, self.round, state)
        begun = eqx.tree_at(lambda s: s.goes_on, state.series, state.running)
        series = lax.while_loop(
            lambda series: series.goes_on & (series.num_steps < self.solver.max_steps),
            self.step,
            begun,
        )
        return self.closed(state, series)

    @property
    def is_one_series(self) -> bool:
        """Whether nothing is looked at between the first step and the last."""
        few = self.solver.max_steps <= _CHECK_EVERY
        return self.solver.rtol is None and self.system.start is None and few

    def closed(self, state: State, series: Series) -> State:
        """The state after a single series, with its residual computed anew."""
        # A step of length zero along a direction that is not finite is not either.
        lost = series.bad_preconditioner | series.nonfinite
        x = tree_where(lost, state.best, series.x)
        left = tree_sub(self.system.b, self.system.product(x))
        broken = lost | series.indefinite
        num_products = series.num_steps + jnp.where(broken, 1, 0) + 1
        return dataclasses.replace(
            state,
            series=eqx.tree_at(lambda s: s.x, series, x),
            residual=tree_norm(left),
            num_products=jnp.where(state.running, num_products, 0),
            converged=~broken,
        )

    def goes_on(self, state: State) -> BoolScalar:
        # Every step is followed by one check at most, so the second half never decides.
        return state.running & (state.num_products < 2 * self.solver.max_steps + 3)

    def round(self, state: State) -> State:
        series = self.system.run_series(
            self.step, state.series, state.num_products, _CHECK_EVERY, self.solver.max_steps
        )
        return self.check(state, series)

    def step(self, s: Series) -> Series:
        z = self.precondition(s.r)
        plain = self.solver.preconditioner is None
        gamma = s.square if plain else tree_dot(s.r, z)
        beta = gamma / s.gamma
        p = tree_axpy(beta, s.p, z)
        p_size = gamma + beta**2 * s.p_size
        product = self.system.product(p)

        # The curvature is compared with the largest one met, each relative to
        # p.M^-1 p, so that the comparison knows neither the number of unknowns nor the
        # scale of anything. Below one unit of rounding it cannot be told from zero.
        p_square = p_size if plain else tree_dot(p, p)
        undamped = tree_dot(p, product)
        curvature = undamped + self.damping * p_square
        max_ratio = jnp.maximum(s.max_ratio, curvature / p_size)
        usable = (gamma > 0) & jnp.isfinite(curvature)
        positive = curvature > self.system.eps * max_ratio * p_size
        taken = usable & positive

        # A step of length zero in place of a choice between vectors. The residual is not
        # read after a step that is not taken.
        alpha = jnp.where(taken, gamma / jnp.where(taken, curvature, 1), 0)
        x = tree_axpy(alpha, p, s.x)
        r = tree_axpy(-alpha, self.damped(p, product), s.r)
        square = jnp.where(taken, tree_dot(r, r), s.square)
        finite = jnp.isfinite(square)
        smallest = jnp.minimum(s.min_curvature, undamped / p_square)
        return Series(
            x=x,
            r=r,
            p=p,
            square=square,
            gamma=gamma,
            p_size=p_size,
            max_ratio=max_ratio,
            min_curvature=jnp.where(usable, smallest, s.min_curvature),
            num_steps=s.num_steps + jnp.where(taken & finite, 1, 0),
            kept=self.keep(s, taken, p, product, curvature),
            goes_on=taken & finite & ~(jnp.sqrt(square) <= self.system.tolerance),
            indefinite=usable & ~positive,
            bad_preconditioner=~(gamma > 0),
            nonfinite=((gamma > 0) & ~jnp.isfinite(curvature)) | ~finite,
        )

    def check(self, state: State, series: Series) -> State:
        x = series.x
        product = self.system.product(x)
        r = tree_sub(self.system.b, self.damped(x, product))
        size = residual = tree_norm(r)
        if self.solver.damping:
            residual = tree_norm(tree_sub(self.system.b, product))
        energy = -(tree_dot(x, self.system.b) + tree_dot(x, r)) / 2
        if self.system.start is not None:
            # A start of higher energy than zero is no help. (NaN compares as false.)
            useless = (series.num_steps == 0) & ~(energy <= 0)
            x, r = tree_where(useless, (state.best, self.system.b), (x, r))
            size = jnp.where(useless, self.system.size, size)
            residual = jnp.where(useless, self.system.size, residual)
            energy = jnp.where(useless, 0, energy)
        within = size <= self.system.tolerance
        claimed = jnp.sqrt(series.square) <= self.system.tolerance
        contradicted = claimed & ~within

        # At the level of rounding neither residual nor energy decrease. Before that the
        # residual may increase for long, and the energy does not.
        progress = self.system.eps * 100 * jnp.abs(state.best_energy)
        lower = energy < state.best_energy - progress
        flat = ~(size < state.least_size) & ~lower
        num_flat = jnp.where(flat, state.num_flat + 1, 0)
        better = energy <= state.best_energy

        exhausted = series.num_steps >= self.solver.max_steps
        broken = series.indefinite | series.bad_preconditioner | series.nonfinite
        if self.solver.rtol is None:
            stagnated = jnp.asarray(False)
            stops = within | broken | exhausted | claimed
        else:
            again = contradicted & ~(size < state.failed_size / 2)
            stagnated = again | (num_flat >= _MAX_FLAT)
            stops = within | broken | exhausted | stagnated
        falls_back = stops & ~within & ~better
        num_products = series.num_steps - state.series.num_steps + jnp.where(broken, 1, 0)
        series = eqx.tree_at(
            lambda s: (s.x, s.r, s.square, s.gamma),
            series,
            (
                tree_where(falls_back, state.best, x),
                r,
                size**2,
                jnp.where(contradicted, jnp.inf, series.gamma),
            ),
        )
        return State(
            series=series,
            residual=jnp.where(falls_back, state.best_residual, residual),
            best=tree_where(better, x, state.best),
            best_energy=jnp.where(better, energy, state.best_energy),
            best_residual=jnp.where(better, residual, state.best_residual),
            least_size=jnp.minimum(state.least_size, size),
            failed_size=jnp.where(contradicted, size, state.failed_size),
            num_products=state.num_products + num_products + 1,
            num_flat=num_flat,
            running=~stops,
            converged=within,
            stagnated=stagnated,
        )

    def result(self, state: State) -> RESULTS:
        series = state.series
        failure = first_failure(
            mask_result(series.nonfinite, RESULTS.linear_nonfinite),
            mask_result(series.indefinite, RESULTS.linear_indefinite),
            mask_result(series.bad_preconditioner, RESULTS.linear_preconditioner),
            mask_result(state.stagnated, RESULTS.linear_stagnation),
            out_of_steps(self.solver.rtol),
        )
        return mask_result(~state.converged, failure)
