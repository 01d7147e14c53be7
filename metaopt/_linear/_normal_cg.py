"""Conjugate gradients on the normal equations."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from .._core._tree import (
    tree_axpy,
    tree_norm,
    tree_scaled_norm,
    tree_zeros_like,
)
from .._core._types import FloatScalar, Vector
from ._base import check_square
from ._minimal_residual import AbstractMinimalResidual, or_one, Step, unit
from ._system import System


class NormalCG(AbstractMinimalResidual):
    r"""Conjugate gradients on the normal equations $A^T A x = A^T b$, for any
    nonsingular square operator.

    Use it where others fail on an operator that is not symmetric: where [`metaopt.GMRES`][]
    stagnates at a length of its cycles that fits in memory, or
    [`metaopt.linear.BiCGStab`][] breaks down. It does neither: whatever the eigenvalues,
    its residual and its error fall in every step, and it keeps five vectors. The price is
    the square of the condition number $\kappa$: about $\kappa$ steps, of two products each,
    one with $A$ and one with its transpose. Do not use it where another method converges,
    least of all for the Hessian of a loss, where [`metaopt.CG`][] needs $\sqrt{\kappa}$
    steps of one product.

    The method updates the residual $b - A x$, and not $A^T$ times it, whose rounding would
    cost half of the digits. The solve is successful once the *true* residual meets $\|b - A
    x\| \le rtol \|b\| + atol$, the norms being Euclidean.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of steps
        asked for by name is no failure. A tolerance below the precision of the vector is
        raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take, of two products each.

    ??? cite "Source"

        Hestenes, Stiefel: *Methods of conjugate gradients for solving linear systems*,
        1952, section 10. Why in this form: Paige, Saunders: *LSQR: an algorithm for
        sparse linear equations and sparse least squares*, 1982.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=1000, static=True)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False
    _products_per_step: ClassVar[int] = 2

    def check(self, operator):
        check_square("NormalCG", operator)

    def _begin(self, system, r, size):
        infinite = jnp.full_like(size, jnp.inf)
        return _Recurrence(r=r, p=tree_zeros_like(r), gradient_size=infinite)

    def _step(self, system: System, recurrence: "_Recurrence", size: FloatScalar) -> Step:
        c = recurrence
        # As by Hestenes and Stiefel, but the directions have another length: that of p is
        # theirs over the norm of the gradient A^T r, and A maps the last one to a unit
        # vector. No norm is squared, and so A may have any scale.
        gradient = system.transposed_product(c.r)
        gradient_size = tree_scaled_norm(gradient)
        beta = gradient_size / c.gradient_size
        p = tree_axpy(beta, c.p, unit(gradient, gradient_size))
        q = system.product(p)
        q_size = tree_scaled_norm(q)
        length = gradient_size / or_one(q_size)
        r = tree_axpy(-length, unit(q, q_size), c.r)
        slope = gradient_size / size
        return Step(
            recurrence=_Recurrence(r=r, p=p, gradient_size=gradient_size),
            direction=unit(p, q_size),
            length=length,
            size=tree_norm(r),
            slope=jnp.where(q_size > 0, slope, 0),
            stretch=slope,
            curvature=jnp.full_like(size, jnp.inf),
        )


class _Recurrence(eqx.Module):
    r: Vector
    p: Vector
    gradient_size: FloatScalar  # of the step before; infinite: forget its direction
