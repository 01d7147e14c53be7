"""Conjugate gradients."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._results import first_failure, mask_result, RESULTS
from .._tree import (
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_structs,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._validate import check_count, check_tolerance
from ._base import (
    AbstractLinearSolver,
    check_square,
    check_structures,
    check_tolerances,
    divided,
    floored_rtol,
    out_of_steps,
    relative,
    reported,
    unit_scale,
)


# One product in this many goes into replacing the residual of the recurrence, which
# drifts away from the true one, by the latter.
_CHECK_EVERY = 50
_MAX_FLAT = 4


class CG(AbstractLinearSolver):
    r"""Conjugate gradients, for the Hessian of an inner loss at its minimum.

    Needs about $\sqrt{\kappa}$ steps, $\kappa$ being the condition number, and one
    product in each. Use it wherever the operator is symmetric and positive definite; no
    other method here needs fewer products there. Do not use it for fixed points or
    roots, whose operator is not symmetric ([`metaopt.GMRES`][]).

    The curvature $p^T A p$ is looked at in every step. Where it is not positive the
    solve stops with the result `linear_indefinite`: a solution found on the other side
    of negative curvature would not be the response of a minimum. A solve is successful
    once the *true* residual $b - A x$ meets $\|b - A x\| \le rtol \|b\| + atol$, the
    norms being Euclidean; it is looked at every 50 steps and before it is believed.

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
        positive definite: a function from vectors to vectors, or a `lineax` operator.

    ??? cite "Source"

        Hestenes, Stiefel: *Methods of conjugate gradients for solving linear systems*,
        1952. Replacing the residual: van der Vorst, Ye: *Residual replacement
        strategies for Krylov subspace iterative methods*, 2000.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=1000, static=True)
    damping: float = eqx.field(default=0.0, static=True)
    preconditioner: Callable[[Vector], Vector] | lx.AbstractLinearOperator | None = None

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")
        if self.damping is None:
            raise ValueError("`damping` must be a non-negative number; got None.")
        check_tolerance(self.damping, "damping")
        if self.preconditioner is not None and not (
            callable(self.preconditioner)
            or isinstance(self.preconditioner, lx.AbstractLinearOperator)
        ):
            raise ValueError(
                "`preconditioner` must be a function from vectors to vectors or a "
                f"`lineax` operator; got {self.preconditioner!r}."
            )

    def check(self, operator):
        check_square("CG", operator)
        if not lx.is_positive_semidefinite(operator):
            promise = "symmetry only" if lx.is_symmetric(operator) else "nothing"
            raise ValueError(
                "`CG` needs a symmetric positive (semi)definite operator, and this one "
                f"promises {promise}. For fixed points, roots and saddles use "
                "`metaopt.GMRES()`, `metaopt.BiCGStab()`, `metaopt.Neumann()` or "
                "`metaopt.Dense()`; if you know that it is definite, give it the tag "
                "`lineax.positive_semidefinite_tag`."
            )

    def solve(self, operator, vector, start=None):
        self.check(operator)
        check_structures(operator, vector, start)
        scale = unit_scale(vector)
        method = _Method(self, lx.linearise(operator), vector, scale)
        state = method.init(start)
        state = lax.while_loop(method.goes_on, method.step, state)
        return reported(
            tree_scale(scale, state.x),
            method.result(state),
            relative(state.residual, method.size),
            state.num_steps,
            state.num_products,
            state.min_curvature,
        )


class _State(eqx.Module):
    x: Vector
    r: Vector  # the residual of the damped system: by recurrence, or true
    p: Vector
    size: FloatScalar  # the norm of r
    gamma: FloatScalar  # r.M r of the step that p was made for
    p_size: FloatScalar  # p.M^-1 p, by recurrence
    residual: FloatScalar  # the norm of b - A x at the last check
    best: Vector  # the iterate of least energy among those checked
    best_energy: FloatScalar
    best_residual: FloatScalar
    least_size: FloatScalar  # the least norm of a true r
    failed_size: FloatScalar  # the norm of the true r when it last contradicted r
    min_curvature: FloatScalar
    max_ratio: FloatScalar  # the largest p.A p / p.M^-1 p
    num_steps: IntScalar
    num_products: IntScalar
    num_flat: IntScalar  # checks in a row that found no progress
    checks: BoolScalar  # the next product is with x, not with p
    claimed: BoolScalar  # ... because r meets the tolerance
    closes: BoolScalar  # ... and is the last one
    restarts: BoolScalar  # the next direction forgets the one before
    running: BoolScalar
    converged: BoolScalar
    indefinite: BoolScalar
    bad_preconditioner: BoolScalar
    nonfinite: BoolScalar
    stagnated: BoolScalar


class _Method:
    """One solve: what stays the same while it runs, and the steps.

    There is one product in the loop, with the direction or, to check, with the iterate.
    So the operator is compiled once, and under `jax.vmap` a check costs only the
    element that makes it.

    Iterates are compared by their energy x.A x / 2 - b.x, which every step lowers, as
    it does the distance to the solution (Hestenes and Stiefel, theorem 6:3). The
    residual goes up first on an ill-conditioned system, where for a long time zero is
    the iterate of least residual.
    """

    def __init__(self, solver: CG, operator, vector, scale):
        self.solver = solver
        self.operator = operator
        self.dtype = tree_dtype(vector)
        self.b = divided(vector, scale)
        self.size = tree_norm(self.b)
        self.scale = scale
        self.eps = float(jnp.finfo(self.dtype).eps)
        self.damping = jnp.asarray(solver.damping, self.dtype)
        if solver.rtol is None:
            # Below the rounding of the right-hand side there is nothing left to do.
            self.tolerance = self.eps * self.size
        else:
            rtol = floored_rtol(solver.rtol, "CG", vector)
            self.tolerance = rtol * self.size + solver.atol / scale

    def product(self, x: Vector) -> Vector:
        return jax.tree.map(lambda a, b: a.astype(b.dtype), self.operator.mv(x), x)

    def precondition(self, r: Vector) -> Vector:
        preconditioner = self.solver.preconditioner
        if preconditioner is None:
            return r
        if isinstance(preconditioner, lx.AbstractLinearOperator):
            z = preconditioner.mv(r)
        else:
            z = preconditioner(r)
        if tree_structs(z) != tree_structs(r):
            raise ValueError(
                "`preconditioner` must return a vector like the one that it is given, "
                f"{tree_structs(r)}; it returned {tree_structs(z)}."
            )
        return z

    def init(self, start: Vector | None) -> _State:
        zero = jnp.zeros((), self.dtype)
        infinite = jnp.full((), jnp.inf, self.dtype)
        false, none = jnp.asarray(False), jnp.zeros((), jnp.int32)
        finite = jnp.isfinite(self.size)
        zeros = x = tree_zeros_like(self.b)
        warm = start is not None
        if warm:
            # For a right-hand side of zero the answer is zero, whatever the start.
            start = divided(start, self.scale)
            x = tree_where(finite & (self.size > 0), start, zeros)
        converged = finite & (self.size <= (zero if warm else self.tolerance))
        z = self.precondition(self.b)
        gamma = tree_dot(self.b, z)
        bad = finite & ~converged & ~(gamma > 0)
        return _State(
            x=x,
            r=self.b,
            p=z,
            size=self.size,
            gamma=gamma,
            p_size=gamma,
            residual=self.size,
            best=zeros,
            best_energy=zero,
            best_residual=self.size,
            least_size=infinite,
            failed_size=infinite,
            min_curvature=infinite,
            max_ratio=zero,
            num_steps=none,
            num_products=none,
            num_flat=none,
            checks=jnp.asarray(warm),
            claimed=false,
            closes=false,
            restarts=jnp.asarray(warm),
            running=finite & ~converged & ~bad,
            converged=converged,
            indefinite=false,
            bad_preconditioner=bad,
            nonfinite=~finite,
            stagnated=false,
        )

    def goes_on(self, s: _State) -> BoolScalar:
        # Every step is followed by one check at most, so the second half never decides.
        return s.running & (s.num_products < 2 * self.solver.max_steps + 3)

    def step(self, s: _State) -> _State:
        operand = tree_where(s.checks, s.x, s.p)
        product = self.product(operand)
        damped = product
        if self.solver.damping != 0:
            damped = tree_axpy(self.damping, operand, product)
        steps = ~s.checks

        # If the product was with the direction: a step. The curvature is compared with
        # the largest one met, each relative to p.M^-1 p, so that the comparison knows
        # neither the number of unknowns nor the scale of anything. Below one unit of
        # rounding of that it cannot be told from zero.
        plain_curvature, p_square = tree_dot(s.p, product), tree_dot(s.p, s.p)
        curvature = plain_curvature + self.damping * p_square
        max_ratio = jnp.maximum(s.max_ratio, curvature / s.p_size)
        positive = curvature > self.eps * max_ratio * s.p_size
        alpha = s.gamma / jnp.where(positive, curvature, 1)
        step_r = tree_axpy(-alpha, damped, s.r)

        # If it was with the iterate: a check.
        r = tree_where(s.checks, tree_sub(self.b, damped), step_r)
        size = residual = tree_norm(r)
        if self.solver.damping != 0:
            residual = tree_norm(tree_sub(self.b, product))
        energy = -(tree_dot(s.x, self.b) + tree_dot(s.x, r)) / 2

        overflow = steps & positive & ~jnp.isfinite(size)
        indefinite = steps & ~positive & jnp.isfinite(curvature)
        nonfinite = overflow | (steps & ~jnp.isfinite(curvature))
        broken = indefinite | nonfinite
        accepted = steps & ~broken
        # A start of higher energy than zero is not a help. (NaN compares as false.)
        useless = s.checks & (s.num_steps == 0) & ~(energy <= 0)

        x = tree_where(accepted, tree_axpy(alpha, s.p, s.x), s.x)
        r = tree_where(broken, s.r, r)
        size = jnp.where(broken, s.size, size)
        x = tree_where(useless, s.best, x)
        r = tree_where(useless, self.b, r)
        size = jnp.where(useless, self.size, size)
        residual = jnp.where(useless, self.size, residual)
        energy = jnp.where(useless, 0, energy)
        num_steps = s.num_steps + jnp.where(accepted, 1, 0)

        within = ~broken & (size <= self.tolerance)
        contradicted = s.checks & s.claimed & ~within
        failed_size = jnp.where(contradicted, size, s.failed_size)

        # Where rounding has the last word neither residual nor energy go down any more.
        # On the way, the former may go up for long, and the latter does not.
        flat = ~(size < s.least_size) & ~(
            energy < s.best_energy - 100 * self.eps * jnp.abs(s.best_energy)
        )
        num_flat = jnp.where(s.checks, jnp.where(flat, s.num_flat + 1, 0), s.num_flat)
        better = s.checks & (energy <= s.best_energy)

        fixed = self.solver.rtol is None
        stagnated = jnp.asarray(False)
        if not fixed:
            stagnated = (num_flat >= _MAX_FLAT) | (
                contradicted & ~(size < s.failed_size / 2)
            )

        # The next direction.
        z = self.precondition(r)
        gamma = tree_dot(r, z)
        bad = ~broken & ~within & ~(gamma > 0)
        restarts = s.restarts | contradicted | useless
        beta = jnp.where(restarts, 0, gamma / s.gamma)

        # What comes next: a step, a check, or the last check.
        stops = s.closes | (s.checks & within)
        claimed = accepted & within
        closes = broken | bad | stagnated | (num_steps >= self.solver.max_steps)
        if fixed:
            closes = closes | claimed
        due = accepted & (num_steps % _CHECK_EVERY == 0)
        checks = closes | claimed | due
        # The direction waits for the residual that a check gives it.
        waits = checks | stops
        falls_back = stops & ~within & ~better
        return _State(
            x=tree_where(falls_back, s.best, x),
            r=r,
            p=tree_where(waits, s.p, tree_axpy(beta, s.p, z)),
            size=size,
            gamma=jnp.where(waits, s.gamma, gamma),
            p_size=jnp.where(waits, s.p_size, gamma + beta**2 * s.p_size),
            residual=jnp.where(
                s.checks, jnp.where(falls_back, s.best_residual, residual), s.residual
            ),
            best=tree_where(better, x, s.best),
            best_energy=jnp.where(better, energy, s.best_energy),
            best_residual=jnp.where(better, residual, s.best_residual),
            least_size=jnp.where(s.checks, jnp.minimum(s.least_size, size), s.least_size),
            failed_size=failed_size,
            min_curvature=jnp.where(
                steps & jnp.isfinite(plain_curvature),
                jnp.minimum(s.min_curvature, plain_curvature / p_square),
                s.min_curvature,
            ),
            max_ratio=jnp.where(steps & positive, max_ratio, s.max_ratio),
            num_steps=num_steps,
            num_products=s.num_products + 1,
            num_flat=num_flat,
            checks=checks,
            claimed=claimed,
            closes=closes,
            restarts=restarts & waits,
            running=~stops,
            converged=within,
            indefinite=s.indefinite | indefinite,
            bad_preconditioner=s.bad_preconditioner | bad,
            nonfinite=s.nonfinite | nonfinite,
            stagnated=s.stagnated | stagnated,
        )

    def result(self, s: _State) -> RESULTS:
        failure = first_failure(
            mask_result(s.nonfinite, RESULTS.linear_nonfinite),
            mask_result(s.indefinite, RESULTS.linear_indefinite),
            mask_result(s.bad_preconditioner, RESULTS.linear_preconditioner),
            mask_result(s.stagnated, RESULTS.linear_stagnation),
            out_of_steps(self.solver.rtol),
        )
        return mask_result(~s.converged, failure)
