"""Minimal residuals, for symmetric operators."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .._core._tree import (
    tree_axpy,
    tree_dot,
    tree_scaled_norm,
    tree_zeros_like,
)
from .._core._types import FloatScalar, Vector
from ._base import check_square
from ._minimal_residual import AbstractMinimalResidual, or_one, Step, unit
from ._system import System


class MINRES(AbstractMinimalResidual):
    r"""Minimal residuals, for symmetric operators that need not be definite.

    Use it for the Hessian of a loss at a saddle. It takes one product in each step and
    seven vectors of memory however many steps it takes, where [`metaopt.GMRES`][] keeps
    one for each. With eigenvalues on both sides of zero it needs about $\kappa$ steps,
    $\kappa$ being the condition number, and about $\sqrt{\kappa}$ otherwise. Do not use
    it at a minimum, where [`metaopt.CG`][] needs as many steps of less work, and says so
    if the minimum is none; nor for fixed points and roots, whose operator is not
    symmetric.

    It is the one linear solver that an implicit adjoint accepts at a saddle:
    `ImplicitAdjoint(MINRES())` asks by name for the derivative of a *stationary point*,
    be it a minimum or not. Negative curvature is then reported and is no failure. It is
    known without a product of its own, along the residual $r$ and along the last basis
    vector of the Krylov space, in every step: $r^T A r$ is not positive as soon as the
    operator is not definite on that space.

    The solve is successful once the *true* residual meets
    $\|b - A x\| \le rtol \|b\| + atol$, the norms being Euclidean; it is looked at every
    50 steps and before it is believed. A singular system is solved where it has a
    solution, by the shortest one from a start of zero, and otherwise ends with the
    result `linear_stagnation` at one of the points of least residual.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of steps
        asked for by name is no failure. A tolerance below the precision of the vector is
        raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take.

    ??? cite "Source"

        Paige, Saunders: *Solution of sparse indefinite systems of linear equations*,
        1975. Singular systems: Choi, Paige, Saunders: *MINRES-QLP: a Krylov subspace
        method for indefinite or singular symmetric systems*, 2011. The curvature: Liu,
        Roosta: *MINRES: from negative curvature detection to monotonicity properties*,
        2022.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=1000, static=True)
    accepts_indefinite: ClassVar[bool] = True
    checks_curvature: ClassVar[bool] = False
    _products_per_step: ClassVar[int] = 1

    def check(self, operator):
        check_square("MINRES", operator)
        if not lx.is_symmetric(operator):
            raise ValueError(
                "`MINRES` needs a symmetric operator, and this one promises nothing. For "
                "fixed points and roots use `metaopt.GMRES()`, "
                "`metaopt.linear.BiCGStab()`, "
                "`metaopt.linear.NormalCG()` or `metaopt.Dense()`; if you know that it is "
                "symmetric, give it the tag `lineax.symmetric_tag`."
            )

    def _begin(self, system, r, size):
        zeros, zero = tree_zeros_like(r), jnp.zeros_like(size)
        return _Lanczos(
            v=unit(r, size),
            v_before=zeros,
            w=zeros,
            w_before=zeros,
            beta=zero,
            gamma=jnp.ones_like(size),
            gamma_before=jnp.ones_like(size),
            delta=zero,
            epsilon=zero,
            cosine=-jnp.ones_like(size),
            sine=zero,
        )

    def _step(self, system: System, recurrence: "_Lanczos", size: FloatScalar) -> Step:
        c = recurrence
        # One step of Lanczos: A V = V T with a tridiagonal T. The norm must not be that
        # of squares which vanish or overflow, because A may have any scale.
        q = tree_axpy(-c.beta, c.v_before, system.product(c.v))
        alpha = tree_dot(c.v, q)
        q = tree_axpy(-alpha, c.v, q)
        beta = tree_scaled_norm(q)

        # One column of the QR factorisation of T: the last reflection, then the next
        # one, which makes (gamma_bar, beta) into (gamma, 0).
        delta = c.cosine * c.delta + c.sine * alpha
        gamma_bar = c.sine * c.delta - c.cosine * alpha
        delta_bar = -c.cosine * beta
        gamma = jnp.hypot(gamma_bar, beta)
        divisor = or_one(gamma)
        cosine, sine = gamma_bar / divisor, beta / divisor

        # One column w / gamma of V R^-1, along which the iterate moves. Not divided by
        # gamma, so that its size has nothing to do with the scale of A.
        w = tree_axpy(-c.epsilon / c.gamma_before, c.w_before, c.v)
        w = tree_axpy(-delta / c.gamma, c.w, w)
        return Step(
            recurrence=_Lanczos(
                v=unit(q, beta),
                v_before=c.v,
                w=w,
                w_before=c.w,
                beta=beta,
                gamma=divisor,
                gamma_before=c.gamma,
                delta=delta_bar,
                epsilon=c.sine * beta,
                cosine=cosine,
                sine=sine,
            ),
            direction=w,
            length=size * cosine / divisor,
            size=size * sine,
            # The residual r before this step is orthogonal to A times the space so far,
            # so that A r / |r| = gamma_bar v + delta_bar v_next; and r.v / |r| is minus
            # the cosine before, the last entry of a row of Q.
            slope=jnp.hypot(gamma_bar, delta_bar),
            stretch=jnp.hypot(alpha, beta),
            curvature=jnp.minimum(-c.cosine * gamma_bar, alpha),
        )


class _Lanczos(eqx.Module):
    """The last columns of the factorisations, in the letters of Choi et al. (2011)."""

    v: Vector
    v_before: Vector
    w: Vector
    w_before: Vector
    beta: FloatScalar
    gamma: FloatScalar
    gamma_before: FloatScalar
    delta: FloatScalar
    epsilon: FloatScalar
    cosine: FloatScalar
    sine: FloatScalar
