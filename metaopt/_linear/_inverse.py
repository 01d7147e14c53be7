"""What approximates an inverse, both ways."""

import abc

import equinox as eqx

from .._types import Vector


class AbstractInverse(eqx.Module):
    r"""An approximation of $(I - J)^{-1}$ that a solver of fixed points has made on its
    way, $J$ being the Jacobian of the map."""

    @abc.abstractmethod
    def apply(self, vector: Vector) -> Vector:
        """The approximation, applied to a vector.

        **Arguments:**

        - `vector`: a vector like the params.
        """

    @abc.abstractmethod
    def transposed(self) -> "AbstractInverse":
        """The approximation of the transposed inverse."""
