"""A linear system as iterative solvers see it: scaled, with a tolerance and a start."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._core._tree import (
    divided,
    scale_and_norm,
    tree_dtype,
    tree_norm,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from ._base import floored_rtol


class System:
    """The constants of one linear solve.

    **Attributes:**

    - `b`, `size`: the right-hand side, divided by `scale` so that its square is a
        number, and its norm.
    - `start`: the first guess, divided likewise, or `None`.
    - `tolerance`: the norm of a residual that is good enough, for the scaled system.
    - `dtype`, `eps`: of the scalars of the method.
    """

    def __init__(
        self,
        solver: str,
        operator: lx.AbstractLinearOperator,
        vector: Vector,
        start: Vector | None,
        rtol: float | None,
        atol: float,
        tolerance: FloatScalar | None,
    ):
        self.operator = lx.linearise(operator)
        self.dtype = tree_dtype(vector)
        self.eps = float(jnp.finfo(self.dtype).eps)
        self.scale, self.size = scale_and_norm(vector)
        self.b = divided(vector, self.scale)
        self.start = None if start is None else divided(start, self.scale)
        if rtol is None:
            # Below the rounding of the right-hand side there is nothing left to do.
            self.tolerance = self.eps * self.size
        else:
            relative = jnp.asarray(floored_rtol(rtol, solver, vector), self.dtype)
            if tolerance is not None:
                relative = jnp.maximum(relative, tolerance.astype(self.dtype))
            self.tolerance = relative * self.size + atol / self.scale

    def product(self, x: Vector) -> Vector:
        """`operator @ x`, each leaf in the dtype of `x`."""
        return jax.tree.map(lambda a, b: a.astype(b.dtype), self.operator.mv(x), x)

    def transposed_product(self, x: Vector) -> Vector:
        """`operator.T @ x`, each leaf in the dtype of `x`."""
        return jax.tree.map(lambda a, b: a.astype(b.dtype), self.operator.T.mv(x), x)

    def first_guess(self) -> tuple[Vector, BoolScalar, BoolScalar]:
        """The initial iterate, whether that is the solution, and whether `b` is finite."""
        finite = jnp.isfinite(self.size)
        zeros = tree_zeros_like(self.b)
        if self.start is None:
            return zeros, finite & (self.size <= self.tolerance), finite
        # For a right-hand side of zero the answer is zero, whatever the start.
        converged = self.size == 0
        return tree_where(finite & ~converged, self.start, zeros), converged, finite

    def checked(self, x: Vector, starts: BoolScalar) -> tuple[Vector, Vector, FloatScalar]:
        """An iterate, its residual, computed from it, and the norm of that.

        A start `x` whose residual is larger than that of zero is replaced by zero.
        """
        r = tree_sub(self.b, self.product(x))
        size = tree_norm(r)
        if self.start is not None:
            useless = starts & ~(size <= self.size)  # or not a number
            x, r = tree_where(useless, (tree_zeros_like(x), self.b), (x, r))
            size = jnp.where(useless, self.size, size)
        return x, r, size

    def run_series(
        self,
        step: Callable[[Any], Any],
        series: Any,
        num_products: IntScalar,
        every: int,
        max_steps: int,
    ) -> Any:
        """Steps in a row, until `series.goes_on` is false or it is time for a check: at
        once for a start, of which nothing is known yet."""
        length = jnp.asarray(every)
        if self.start is not None:
            length = jnp.where(num_products == 0, 0, length)
        end = jnp.minimum(series.num_steps + length, max_steps)
        series = eqx.tree_at(lambda s: s.goes_on, series, series.num_steps < end)
        return lax.while_loop(
            lambda series: series.goes_on & (series.num_steps < end), step, series
        )
