"""Stabilised biconjugate gradients."""

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
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._validate import check_count
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


_CHECK_EVERY = 25  # steps of two products


class BiCGStab(AbstractLinearSolver):
    r"""Stabilised biconjugate gradients, for any square operator.

    Needs seven vectors of memory however many steps it takes, and two products in each
    of them. Use it where [`metaopt.GMRES`][] would need a longer cycle than fits in
    memory. Its residual goes up and down, and it can break down where GMRES does not;
    it then starts again from where it is.

    The solve is successful once the true residual meets
    $\|b - A x\| \le rtol \|b\| + atol$, the norms being Euclidean.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of
        steps asked for by name is no failure. What the precision of the vector cannot
        reach is raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take, of two products each.

    ??? cite "Source"

        van der Vorst: *Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for
        the solution of nonsymmetric linear systems*, 1992.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=500, static=True)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")

    def check(self, operator):
        check_square("BiCGStab", operator)

    def solve(self, operator, vector, start=None):
        # Not the method of `lineax`, which divides by zero where half a step solves the
        # system exactly, as for the identity.
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
        )


class _State(eqx.Module):
    x: Vector
    r: Vector
    p: Vector
    s: Vector  # the residual after the first half of a step
    v: Vector  # A p
    shadow: Vector
    size: FloatScalar  # the norm of r
    rho: FloatScalar  # shadow.r
    alpha: FloatScalar
    residual: FloatScalar  # the norm of b - A x at the last check
    best: Vector
    best_size: FloatScalar
    restarted_size: FloatScalar  # `best_size` at the last restart
    num_steps: IntScalar
    num_products: IntScalar
    num_worse: IntScalar
    second: BoolScalar  # the next product is that of the second half of a step
    checks: BoolScalar  # the next product is with x
    restarts: BoolScalar  # ... and a new series begins there
    closes: BoolScalar  # ... and is the last one
    running: BoolScalar
    converged: BoolScalar
    nonfinite: BoolScalar
    stagnated: BoolScalar


class _Method:
    """One solve. As in conjugate gradients there is one product in the loop, with the
    direction, with the half-way residual or, to check, with the iterate."""

    def __init__(self, solver: BiCGStab, operator, vector, scale):
        self.solver = solver
        self.operator = operator
        self.dtype = tree_dtype(vector)
        self.b = divided(vector, scale)
        self.size = tree_norm(self.b)
        self.scale = scale
        self.eps = float(jnp.finfo(self.dtype).eps)
        self.max_worse = max(50, solver.max_steps // 4)
        if solver.rtol is None:
            self.tolerance = self.eps * self.size
        else:
            rtol = floored_rtol(solver.rtol, "BiCGStab", vector)
            self.tolerance = rtol * self.size + solver.atol / scale

    def init(self, start: Vector | None) -> _State:
        infinite = jnp.full((), jnp.inf, self.dtype)
        false, none = jnp.asarray(False), jnp.zeros((), jnp.int32)
        finite = jnp.isfinite(self.size)
        x = tree_zeros_like(self.b)
        warm = start is not None
        if warm:
            start = divided(start, self.scale)
            x = tree_where(finite & (self.size > 0), start, x)
        converged = finite & (self.size <= (0 if warm else self.tolerance))
        return _State(
            x=x,
            r=self.b,
            p=self.b,
            s=self.b,
            v=self.b,
            shadow=self.b,
            size=self.size,
            rho=self.size**2,
            alpha=jnp.ones((), self.dtype),
            residual=self.size,
            best=x,
            best_size=infinite if warm else self.size,
            restarted_size=infinite,
            num_steps=none,
            num_products=none,
            num_worse=none,
            second=false,
            checks=jnp.asarray(warm),
            restarts=jnp.asarray(warm),
            closes=false,
            running=finite & ~converged,
            converged=converged,
            nonfinite=~finite,
            stagnated=false,
        )

    def goes_on(self, c: _State) -> BoolScalar:
        # A step has two products and is followed by one check at most, as is a
        # breakdown in its first half. The second half of this never decides.
        return c.running & (c.num_products < 5 * self.solver.max_steps + 5)

    def step(self, c: _State) -> _State:
        operand = tree_where(c.checks, c.x, tree_where(c.second, c.s, c.p))
        product = self.operator.mv(operand)
        product = jax.tree.map(lambda a, b: a.astype(b.dtype), product, operand)
        first = ~c.checks & ~c.second
        second = ~c.checks & c.second

        # The first half: from r to s along p.
        shadow_product = tree_dot(c.shadow, product)
        usual = jnp.abs(shadow_product) > self.eps * tree_norm(c.shadow) * tree_norm(
            product
        )
        alpha = jnp.where(usual, c.rho / jnp.where(usual, shadow_product, 1), 0)
        half_r = tree_axpy(-alpha, product, c.r)
        broken = first & ~usual

        # The second half: from s to r along s. If s is zero already, so is its product.
        square = tree_dot(product, product)
        omega = tree_dot(product, c.s) / jnp.where(square > 0, square, 1)
        step_x = tree_axpy(omega, c.s, tree_axpy(c.alpha, c.p, c.x))
        step_r = tree_axpy(-omega, product, c.s)

        # The check.
        true_r = tree_sub(self.b, product)

        r = tree_where(c.checks, true_r, tree_where(second, step_r, c.r))
        size = tree_norm(r)
        overflow = (second & ~jnp.isfinite(size)) | (first & ~jnp.isfinite(alpha))
        overflow = overflow | (first & ~jnp.isfinite(shadow_product))
        useless = c.checks & (c.num_steps == 0) & ~(size <= self.size)
        x = tree_where(second & ~overflow, step_x, c.x)
        x = tree_where(useless, tree_zeros_like(x), x)
        r = tree_where(useless, self.b, tree_where(overflow, c.r, r))
        size = jnp.where(useless, self.size, jnp.where(overflow, c.size, size))
        num_steps = c.num_steps + jnp.where(second & ~overflow, 1, 0)

        drifted = c.checks & (size > 2 * c.size)
        best_size = jnp.where(drifted, jnp.maximum(c.best_size, size), c.best_size)
        better = ~first & ~overflow & (size <= best_size)
        best = tree_where(better, x, c.best)
        best_size = jnp.where(better, size, best_size)
        num_worse = jnp.where(better, 0, c.num_worse + jnp.where(second, 1, 0))
        within = ~first & ~overflow & (size <= self.tolerance)

        # The next direction, of the same series or of a new one from here.
        rho = tree_dot(c.shadow, r)
        broken = broken | (
            second
            & ~within
            & ~(
                (jnp.abs(rho) > self.eps * tree_norm(c.shadow) * size)
                & (jnp.abs(omega) > 0)
            )
        )
        restarts = c.checks & c.restarts
        beta = (rho / jnp.where(c.rho == 0, 1, c.rho)) * (
            c.alpha / jnp.where(omega == 0, 1, omega)
        )
        next_p = tree_axpy(beta, tree_axpy(-omega, c.v, c.p), r)
        # A check that does not restart leaves the direction that was made before it.
        p = tree_where(restarts, r, tree_where(second, next_p, c.p))
        rho = jnp.where(restarts, size**2, jnp.where(second, rho, c.rho))

        fixed = self.solver.rtol is None
        stagnated = jnp.asarray(False)
        if not fixed:
            # A series that ended before it gained anything will do so again.
            again = restarts & ~within & ~(size < 0.99 * c.restarted_size)
            stagnated = again | (num_worse >= self.max_worse)
        stops = c.closes | (c.checks & within)
        closes = overflow | stagnated
        closes = closes | (~first & (num_steps >= self.solver.max_steps))
        claimed = second & within
        if fixed:
            closes = closes | claimed | (restarts & ~(size < 0.99 * c.restarted_size))
        due = second & (num_steps % _CHECK_EVERY == 0)
        to_best = closes & ~stops & (overflow | stagnated if fixed else True)
        return _State(
            x=tree_where(to_best, best, x),
            r=r,
            p=p,
            s=tree_where(first, half_r, c.s),
            v=tree_where(first, product, c.v),
            shadow=tree_where(restarts, r, c.shadow),
            size=jnp.where(to_best, best_size, size),
            rho=rho,
            alpha=jnp.where(first, alpha, c.alpha),
            residual=jnp.where(c.checks, size, c.residual),
            best=best,
            best_size=best_size,
            restarted_size=jnp.where(restarts, size, c.restarted_size),
            num_steps=num_steps,
            num_products=c.num_products + 1,
            num_worse=num_worse,
            second=first & ~broken & ~overflow,
            checks=closes | claimed | due | broken,
            restarts=claimed | broken,
            closes=closes,
            running=~stops,
            converged=within,
            nonfinite=c.nonfinite | overflow,
            stagnated=c.stagnated | stagnated,
        )

    def result(self, c: _State) -> RESULTS:
        failure = first_failure(
            mask_result(c.nonfinite, RESULTS.linear_nonfinite),
            mask_result(c.stagnated, RESULTS.linear_stagnation),
            out_of_steps(self.solver.rtol),
        )
        return mask_result(~c.converged, failure)
