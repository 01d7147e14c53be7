"""Conjugate gradients."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import (
    same_structs,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_num_bytes,
    tree_put,
    tree_rooms,
    tree_scale,
    tree_structs,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._core._validate import check_count, check_tolerance
from ._base import (
    AbstractToleranceSolver,
    check_square,
    check_structures,
    check_tolerances,
    out_of_steps,
    relative,
    reported,
    steps_left_out,
    Subspace,
)
from ._preconditioned import AbstractPreconditionedSolver
from ._preconditioner import AbstractPreconditioner
from ._prepare import prepare
from ._rough_cg import RoughCG
from ._system import System


_CHECK_EVERY = 50
_MAX_FLAT = 4  # checks in a row without progress
_MAX_KEPT = 100  # directions
_MIN_KEPT = 10
_MAX_KEPT_BYTES = 4 * 2**20


class CG(AbstractPreconditionedSolver, AbstractToleranceSolver):
    r"""Conjugate gradients, for the Hessian of an inner loss at its minimum.

    Needs about $\sqrt{\kappa}$ steps, $\kappa$ being the condition number, and one
    product in each. Use it wherever the operator is symmetric and positive definite,
    unless it is small enough for [`metaopt.Dense`][]. Do not use it for fixed points or
    roots, whose operator is not symmetric ([`metaopt.GMRES`][]).

    The curvature $p^T A p$ is looked at in every step. Where it is not positive the solve
    stops with the result `linear_indefinite`: a solution found on the other side of
    negative curvature would not be the response of a minimum. Whoever wants that of another
    stationary point asks for it with [`metaopt.linear.MINRES`][]. A solve is successful
    once the *true* residual $b - A x$ meets $\|b - A x\| \le rtol \|b\| + atol$, the norms
    being Euclidean; it is looked at every 50 steps and before it is believed.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of
        steps asked for by name is no failure. What the precision of the vector cannot
        reach is raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take.
    - `damping`: solves with $A + damping \cdot I$ instead. It makes the operator more
        definite and the answer wrong: damping of the size of the smallest eigenvalue
        can cost half of the hypergradient. The residual reported is that without it.
    - `preconditioner`: an approximation of the inverse of $A$, itself symmetric and
        positive definite: one that is made from products with $A$ or from what the inner
        solver knows ([`metaopt.linear.DiagonalEstimate`][], [`metaopt.linear.LowRank`][],
        [`metaopt.linear.SecondMoment`][]), a function from vectors to vectors, or a
        `lineax` operator.

    ??? cite "Source"

        Hestenes, Stiefel: *Methods of conjugate gradients for solving linear systems*,
        1952. Replacing the residual: van der Vorst, Ye: *Residual replacement
        strategies for Krylov subspace iterative methods*, 2000.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=1000, static=True)
    damping: float = eqx.field(default=0.0, static=True)
    preconditioner: (
        AbstractPreconditioner
        | Callable[[Vector], Vector]
        | lx.AbstractLinearOperator
        | None
    ) = None
    num_kept: int = eqx.field(default=0, static=True, repr=False)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = True

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")
        check_tolerance(self.damping, "damping", optional=False)
        made = (AbstractPreconditioner, lx.AbstractLinearOperator)
        if self.preconditioner is None or isinstance(self.preconditioner, made):
            return
        if not callable(self.preconditioner) or isinstance(self.preconditioner, type):
            raise ValueError(
                "`preconditioner` must be one of metaopt, such as "
                "`metaopt.linear.DiagonalEstimate()`, a function from vectors to vectors "
                f"or a `lineax` operator; got {self.preconditioner!r}."
            )

    @property
    def left_out(self):
        damping = (f"the damping of {self.damping:g}",) if self.damping else ()
        return damping + steps_left_out(self.rtol, self.max_steps)

    def check(self, operator):
        check_square("CG", operator)
        if not lx.is_positive_semidefinite(operator):
            promise = "symmetry only" if lx.is_symmetric(operator) else "nothing"
            raise ValueError(
                "`CG` needs a symmetric positive (semi)definite operator, and this one "
                f"promises {promise}. For saddles use `metaopt.linear.MINRES()`, which "
                "needs symmetry only; for fixed points and roots `metaopt.GMRES()`, "
                "`metaopt.linear.BiCGStab()`, `metaopt.linear.NormalCG()`, "
                "`metaopt.Neumann(20)` or "
                "`metaopt.Dense()`; if you know that it is definite, give it the tag "
                "`lineax.positive_semidefinite_tag`."
            )

    @property
    def relative_tolerance(self):
        return self.rtol

    def with_rtol(self, rtol):
        return dataclasses.replace(self, rtol=rtol, damping=0.0)

    def rough(self, rtol):
        if self.preconditioner is not None:
            return self.with_rtol(rtol)
        return RoughCG(rtol, self.max_steps)

    def keeping_directions(self, vector):
        # A direction and its product are kept.
        room = _MAX_KEPT_BYTES // max(2 * tree_num_bytes(vector), 1)
        num_kept = min(room, _MAX_KEPT, self.max_steps)
        # A few of many directions know little.
        useful = num_kept >= min(_MIN_KEPT, self.max_steps) and not self.damping
        return dataclasses.replace(self, num_kept=num_kept if useful else 0)

    def damped(self, operator):
        if not self.damping:
            return operator
        damping = jnp.asarray(self.damping, tree_dtype(operator.in_structure()))
        return lx.FunctionLinearOperator(
            lambda x: tree_axpy(damping, x, operator.mv(x)),
            operator.in_structure(),
        )

    def solve(self, operator, vector, start=None, tolerance=None):
        self.check(operator)
        check_structures(operator, vector, start)
        system = System("CG", operator, vector, start, self.rtol, self.atol, tolerance)
        # Ready already, unless it is used without an adjoint.
        ready, _, num_products = prepare(self, system.operator)
        assert isinstance(ready, CG)
        method = _Method(ready, system)
        state = lax.while_loop(method.goes_on, method.round, method.init())
        series = state.series
        solution = reported(
            tree_scale(system.scale, series.x),
            method.result(state),
            relative(state.residual, system.size),
            series.num_steps,
            state.num_products + num_products,
            series.min_curvature,
        )
        return dataclasses.replace(solution, subspace=series.kept)


class _Series(eqx.Module):
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


class _State(eqx.Module):
    """The state of the checks between the series."""

    series: _Series
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


class _Method:
    """One solve: what stays the same while it runs, and its rounds.

    A round is a series of textbook steps and then a check, which computes the residual
    and hands it to the next series. Only a check looks at anything but scalars and the
    three vectors of the method.

    Iterates are compared by their energy x.A x / 2 - b.x, which every step lowers, as
    it does the distance to the solution (Hestenes and Stiefel, theorem 6:3). The
    residual goes up first on an ill-conditioned system, where for a long time zero is
    the iterate of least residual.
    """

    def __init__(self, solver: CG, system: System):
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

    def keep(self, s: _Series, taken, p: Vector, product: Vector, curvature):
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

    def init(self) -> _State:
        zero, infinite = (
            jnp.zeros((), self.system.dtype),
            jnp.full((), jnp.inf, self.system.dtype),
        )
        none, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
        x, converged, finite = self.system.first_guess()
        zeros = tree_zeros_like(x)
        series = _Series(
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
        return _State(
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

    def goes_on(self, state: _State) -> BoolScalar:
        # Every step is followed by one check at most, so the second half never decides.
        return state.running & (state.num_products < 2 * self.solver.max_steps + 3)

    def round(self, state: _State) -> _State:
        series = self.system.run_series(
            self.step, state.series, state.num_products, _CHECK_EVERY, self.solver.max_steps
        )
        return self.check(state, series)

    def step(self, s: _Series) -> _Series:
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

        alpha = gamma / jnp.where(taken, curvature, 1)
        x = tree_where(taken, tree_axpy(alpha, p, s.x), s.x)
        r = tree_where(taken, tree_axpy(-alpha, self.damped(p, product), s.r), s.r)
        square = tree_dot(r, r)
        finite = jnp.isfinite(square)
        smallest = jnp.minimum(s.min_curvature, undamped / p_square)
        return _Series(
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

    def check(self, state: _State, series: _Series) -> _State:
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

        # Where rounding has the last word neither residual nor energy go down any more.
        # On the way, the former may go up for long, and the latter does not.
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
        return _State(
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

    def result(self, state: _State) -> RESULTS:
        series = state.series
        failure = first_failure(
            mask_result(series.nonfinite, RESULTS.linear_nonfinite),
            mask_result(series.indefinite, RESULTS.linear_indefinite),
            mask_result(series.bad_preconditioner, RESULTS.linear_preconditioner),
            mask_result(state.stagnated, RESULTS.linear_stagnation),
            out_of_steps(self.solver.rtol),
        )
        return mask_result(~state.converged, failure)
