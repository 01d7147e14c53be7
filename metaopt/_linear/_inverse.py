"""Approximate inverses, which can be transposed."""

import abc

import equinox as eqx
from jaxtyping import Array

from .._core._types import Vector


class AbstractInverse(eqx.Module):
    r"""An approximation of $(I - J)^{-1}$ that a fixed-point solver has built during its
    steps, $J$ being the Jacobian of the map."""

    @abc.abstractmethod
    def apply(self, vector: Vector) -> Vector:
        """The approximation, applied to a vector.

        **Arguments:**

        - `vector`: a vector like the params.

        **Returns:**

        A vector likewise.
        """

    @abc.abstractmethod
    def transposed(self) -> "AbstractInverse":
        """The approximation of the transposed inverse.

        **Returns:**

        Another one of these.
        """

    @abc.abstractmethod
    def norm(self, vector: Vector) -> Array:
        """The norm of a vector, one for each fixed point that it holds.

        **Arguments:**

        - `vector`: a vector like the params.

        **Returns:**

        A scalar, or an array `(n,)` for params that hold `n` fixed points.
        """

    @abc.abstractmethod
    def choose(self, condition: Array, x: Vector, y: Vector) -> Vector:
        """One vector or the other for each fixed point.

        **Arguments:**

        - `condition`: of the shape that `norm` returns.
        - `x`, `y`: vectors like the params.

        **Returns:**

        `x` where the condition holds, else `y`.
        """
