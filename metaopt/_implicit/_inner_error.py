"""The relative error of an inner solution, from one product with the Jacobian."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import RESULTS, where_result
from .._core._tree import (
    divided,
    split_trainable,
    tree_cast_like,
    tree_inner,
    tree_length,
    tree_sub,
)
from .._core._types import FloatScalar, Params, Vector


_OF_THE_WAY = 1e-3


class InnerError(eqx.Module):
    """The distance of params from the inner solution, and a length to compare it with.

    **Attributes:**

    - `residual`: the optimality at the params.
    - `distance`: the length of the Newton step to the solution, estimated from below.
    - `params`: the params, a vector.
    - `way`: the part of the way from the start to the params that counts as their size;
        `None` where no start is known.
    """

    residual: Vector
    distance: FloatScalar
    params: Vector
    way: Vector | None

    @classmethod
    def at(
        cls, residual: Vector, distance: FloatScalar, params: Vector, start: Params | None
    ) -> "InnerError":
        """Compare the error of params with the distance from `start`, where that is
        known."""
        way = None
        if start is not None:
            begun = tree_cast_like(split_trainable(start)[0], params)
            part = lambda leaf: leaf * jnp.asarray(_OF_THE_WAY, leaf.dtype)
            way = jax.tree.map(part, tree_sub(params, begun))
        return cls(residual, distance, params, way)

    def relative(self, solution: Vector, vector: Vector) -> FloatScalar:
        """Estimate the relative error of the params, from below.

        With $A w = b$ solved for the derivative, $w . r = b . A^{-1} r$ is the step that
        is still to come, $A^{-1} r$, projected on $b$: for a hypergradient, on the
        direction in which the outer loss changes. It sees slow directions, which the
        residual hides. It is compared with the params as $b$ weighs them, because large
        params that the outer loss does not look at excuse nothing.

        **Arguments:**

        - `solution`, `vector`: $w$ and $b$.
        """
        size = tree_length(vector)
        weights = divided(vector, _or_one(size))
        along = jnp.abs(tree_inner(solution, divided(self.residual, _or_one(size))))
        weighed = lambda x: tree_length(jax.tree.map(jnp.multiply, weights, x))
        return jnp.maximum(
            self._compared(self.distance, tree_length),
            jnp.where(size > 0, self._compared(along, weighed), 0.0),
        )

    def _compared(self, length: FloatScalar, norm: Callable) -> FloatScalar:
        size = norm(self.params)
        if self.way is not None:
            # A solution near zero is good if it is near in comparison with the way to it.
            size = jnp.maximum(size, norm(self.way))
        return jnp.where(length == 0, 0.0, length / size)


def judge_inner(
    error: FloatScalar, rtol: float, tolerance: FloatScalar | None = None
) -> Any:
    """Return the result for an inner solution of this relative error: a failure unless it
    is at most `rtol`, or at most `tolerance` where that is more."""
    if rtol == jnp.inf:
        return RESULTS.successful
    allowed = jnp.asarray(rtol)
    if tolerance is not None:
        allowed = jnp.maximum(allowed, tolerance)
    good = error <= allowed
    return where_result(good, RESULTS.successful, RESULTS.inner_not_converged)


def _or_one(size: FloatScalar) -> FloatScalar:
    return jnp.where(size > 0, size, 1)
