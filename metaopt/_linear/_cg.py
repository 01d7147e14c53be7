"""Conjugate gradients."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._results import RESULTS
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
    floored_rtol,
    relative,
    reported,
    unit_scale,
)

# One product in this many goes into replacing the residual of the recurrence, which
# drifts away from the true one, by the latter.
_CHECK_EVERY = 50


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
            promised = "is symmetric" if lx.is_symmetric(operator) else "promises nothing"
            raise ValueError(
                "`CG` needs a symmetric positive (semi)definite operator, and this one "
                f"{promised}. For fixed points, roots and saddles use `metaopt.GMRES()`"
                ", `metaopt.BiCGStab()`, `metaopt.Neumann()` or `metaopt.Dense()`; if "
                "you know that it is definite, give it the tag "
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
            jnp.where(method.size == 0, 0, relative(state.residual, method.size)),
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
    best: Vector
    best_size: FloatScalar
    failed_size: FloatScalar  # the true residual when it last contradicted r
    min_curvature: FloatScalar
    max_ratio: FloatScalar  # the largest p.A p / p.M^-1 p
    num_steps: IntScalar
    num_products: IntScalar
    num_worse: IntScalar  # steps since `best` changed
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
    So the operator is compiled once, and under `jax.vmap` a check costs only the element
    that makes it.
    """

    def __init__(self, solver: CG, operator, vector, scale):
        self.solver = solver
        self.operator = operator
        self.dtype = tree_dtype(vector)
        self.b = jax.tree.map(lambda a: a / scale.astype(a.dtype), vector)
        self.size = tree_norm(self.b)
        self.scale = scale
        self.eps = float(jnp.finfo(self.dtype).eps)
        self.damping = jnp.asarray(solver.damping, self.dtype)
        self.max_worse = max(50, solver.max_steps // 4)
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
            preconditioner = preconditioner.mv
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
        x = tree_zeros_like(self.b)
        warm = start is not None
        if warm:
            # A solve that is over before it starts has the solution zero.
            start = jax.tree.map(lambda a: a / self.scale.astype(a.dtype), start)
            x = tree_where(finite & (self.size > 0), start, x)
        converged = self.size <= (zero if warm else self.tolerance)
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
            best=x,
            best_size=infinite if warm else self.size,
            failed_size=infinite,
            min_curvature=infinite,
            max_ratio=zero,
            num_steps=none,
            num_products=none,
            num_worse=none,
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
        # Every step is followed by one check at most. The second half never decides.
        limit = 2 * self.solver.max_steps + 3
        return s.running & (s.num_products < limit)

    def step(self, s: _State) -> _State:
        operand = tree_where(s.checks, s.x, s.p)
        product = self.product(operand)
        damped = product
        if self.solver.damping != 0:
            damped = tree_axpy(self.damping, operand, product)

        # What the product is if it was with the iterate: a check.
        true_r = tree_sub(self.b, damped)
        # ... and if it was with the direction. Curvature is compared with that met
        # before, each relative to p.M^-1 p, so that the comparison knows neither the
        # number of unknowns nor the scale of anything. Below one unit of rounding of
        # the largest it cannot be told from zero.
        plain_curvature, p_square = tree_dot(s.p, product), tree_dot(s.p, s.p)
        curvature = plain_curvature + self.damping * p_square
        ratio = curvature / s.p_size
        max_ratio = jnp.maximum(s.max_ratio, ratio)
        positive = curvature > self.eps * max_ratio * s.p_size
        alpha = s.gamma / jnp.where(positive, curvature, 1)
        step_x, step_r = tree_axpy(alpha, s.p, s.x), tree_axpy(-alpha, damped, s.r)

        steps = ~s.checks
        r = tree_where(s.checks, true_r, step_r)
        size = residual = tree_norm(r)
        if self.solver.damping != 0:
            residual = tree_norm(tree_sub(self.b, product))
        broken = steps & ~(positive & jnp.isfinite(size))
        # A start that is further from the solution than zero is not a help.
        useless = s.checks & (s.num_steps == 0) & ~(size <= self.size)
        x = tree_where(steps & ~broken, step_x, s.x)
        x = tree_where(useless, tree_zeros_like(x), x)
        r = tree_where(useless, self.b, tree_where(broken, s.r, r))
        size = jnp.where(useless, self.size, jnp.where(broken, s.size, size))
        residual = jnp.where(useless, self.size, residual)
        num_steps = s.num_steps + jnp.where(steps & ~broken, 1, 0)

        # Sizes that come from the recurrence are not to be trusted where a check says
        # otherwise.
        drifted = s.checks & (size > 2 * s.size)
        best_size = jnp.where(drifted, jnp.maximum(s.best_size, size), s.best_size)
        better = ~broken & (size <= best_size)
        best = tree_where(better, x, s.best)
        best_size = jnp.where(better, size, best_size)
        num_worse = jnp.where(better, 0, s.num_worse + jnp.where(steps, 1, 0))

        within = ~broken & (size <= self.tolerance)
        contradicted = s.checks & s.claimed & ~within
        failed_size = jnp.where(contradicted, size, s.failed_size)
        fixed = self.solver.rtol is None
        stagnated = jnp.asarray(False)
        if not fixed:
            stagnated = contradicted & ~(size < s.failed_size / 2)
            stagnated = stagnated | (num_worse >= self.max_worse)

        # The next direction.
        z = self.precondition(r)
        gamma = tree_dot(r, z)
        restarts = s.restarts | contradicted
        beta = jnp.where(restarts, 0, gamma / s.gamma)
        p = tree_axpy(beta, s.p, z)
        p_size = gamma + beta**2 * s.p_size
        bad = ~broken & ~within & ~(gamma > 0)

        # What comes next: a step, a check, or the last check.
        stops = s.closes | (s.checks & within)
        closes = broken | bad | stagnated | (num_steps >= self.solver.max_steps)
        if fixed:
            closes = closes | (steps & within)
        claimed = steps & within
        due = steps & (num_steps % _CHECK_EVERY == 0)
        checks = closes | claimed | due
        keeps = checks | stops
        # With a number of steps asked for by name, the last iterate is the answer.
        to_best = closes & ~stops & (broken | bad if fixed else True)
        return _State(
            x=tree_where(to_best, best, x),
            r=r,
            p=tree_where(keeps, s.p, p),
            size=jnp.where(to_best, best_size, size),
            gamma=jnp.where(keeps, s.gamma, gamma),
            p_size=jnp.where(keeps, s.p_size, p_size),
            residual=jnp.where(s.checks, residual, s.residual),
            best=best,
            best_size=best_size,
            failed_size=failed_size,
            min_curvature=jnp.where(
                steps & jnp.isfinite(plain_curvature),
                jnp.minimum(s.min_curvature, plain_curvature / p_square),
                s.min_curvature,
            ),
            max_ratio=jnp.where(steps & positive, max_ratio, s.max_ratio),
            num_steps=num_steps,
            num_products=s.num_products + 1,
            num_worse=num_worse,
            checks=checks,
            claimed=claimed,
            closes=closes,
            restarts=restarts & keeps,
            running=~stops,
            converged=within,
            indefinite=s.indefinite | (broken & ~positive & jnp.isfinite(curvature)),
            bad_preconditioner=s.bad_preconditioner | bad,
            nonfinite=s.nonfinite
            | (broken & ~(jnp.isfinite(curvature) & (~positive | jnp.isfinite(size)))),
            stagnated=s.stagnated | stagnated,
        )

    def result(self, s: _State) -> RESULTS:
        result = RESULTS.linear_max_steps
        if self.solver.rtol is None:
            result = RESULTS.successful
        for failed, code in (
            (s.stagnated, RESULTS.linear_stagnation),
            (s.bad_preconditioner, RESULTS.linear_preconditioner),
            (s.indefinite, RESULTS.linear_indefinite),
            (s.nonfinite, RESULTS.linear_nonfinite),
        ):
            result = RESULTS.where(failed, code, result)
        return RESULTS.where(s.converged, RESULTS.successful, result)
