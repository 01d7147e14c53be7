"""Conjugate gradients for corrections of which a digit suffices."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from .._core._results import first_failure
from .._core._tree import tree_axpy, tree_dot, tree_dtype, tree_where, tree_zeros_like
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from ._base import AbstractLinearSolver, check_square, check_structures, relative, reported


class RoughCG(AbstractLinearSolver):
    """Textbook conjugate gradients, without any check but that of the curvature.

    A rough solution needs no true residual and no best iterate, so that it compiles to
    little and takes one product in each step. A step along negative curvature ends it;
    the caller looks at `min_curvature`.
    The right-hand side must be of a size whose square is a number.
    """

    rtol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = True

    @property
    def left_out(self):
        return ()

    def check(self, operator):
        check_square("RoughCG", operator)

    def solve(self, operator, vector, start=None, tolerance=None):
        check_structures(operator, vector, start)
        dtype = tree_dtype(vector)
        square = tree_dot(vector, vector)
        rtol = jnp.asarray(self.rtol, dtype)
        if tolerance is not None:
            rtol = jnp.maximum(rtol, tolerance.astype(dtype))
        enough = rtol**2 * square

        def step(s: _State) -> _State:
            product = operator.mv(s.p)
            curvature = tree_dot(s.p, product)
            length = s.square / jnp.where(curvature > 0, curvature, 1)
            r = tree_axpy(-length, product, s.r)
            new = tree_dot(r, r)
            taken = (curvature > 0) & jnp.isfinite(new)
            return _State(
                x=tree_where(taken, tree_axpy(length, s.p, s.x), s.x),
                r=r,
                p=tree_axpy(new / s.square, s.p, r),
                square=jnp.where(taken, new, s.square),
                min_curvature=jnp.minimum(s.min_curvature, curvature / tree_dot(s.p, s.p)),
                num_steps=s.num_steps + 1,
                goes_on=taken & ~(new <= enough),
            )

        # NaN and zero compare as false.
        goes_on = (square > enough) & jnp.isfinite(square)
        none = jnp.zeros((), jnp.int32)
        infinite = jnp.full_like(square, jnp.inf)
        zeros = tree_zeros_like(vector)
        state = lax.while_loop(
            lambda s: s.goes_on & (s.num_steps < self.max_steps),
            step,
            _State(zeros, vector, vector, square, infinite, none, goes_on),
        )
        residual = relative(jnp.sqrt(state.square), jnp.sqrt(square))
        steps = state.num_steps
        smallest = state.min_curvature
        return reported(state.x, first_failure(), residual, steps, steps, smallest)


class _State(eqx.Module):
    x: Vector
    r: Vector
    p: Vector
    square: FloatScalar  # r.r
    min_curvature: FloatScalar
    num_steps: IntScalar
    goes_on: BoolScalar
