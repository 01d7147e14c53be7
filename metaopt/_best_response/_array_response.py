"""The response of one array of a layer to a perturbation."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core._tree import tree_dot, tree_widened
from .._core._types import FloatScalar
from ._perturbation import Perturbation


class AbstractArrayResponse(eqx.Module):
    """The linear response of one array of a layer to a perturbation."""

    @property
    @abc.abstractmethod
    def num_hyper(self) -> int:
        """The length of the perturbation."""

    @abc.abstractmethod
    def check(self, general: Any, whose: str) -> None:
        """Raise a `ValueError` unless the response fits an array."""

    @abc.abstractmethod
    def effective(self, general: Array, perturbation: Perturbation) -> Array:
        """The array at a perturbation; `general` is the one at zero."""

    @abc.abstractmethod
    def squared_norm(self, general: Array, perturbation: Perturbation) -> FloatScalar:
        """The sum of the squares of the array at a perturbation, without forming it, in
        float32 at least."""


class RowScaling(AbstractArrayResponse):
    r"""The response of a weight matrix: each row of response weights is scaled,

    $$W(\lambda) = W + \mathrm{diag}(S \lambda)\, W'$$

    (MacKay et al., 2019, equation 11). Its product with an input needs no weights of
    its own for each perturbation: $W(\lambda)\, x = W x + (S \lambda) \odot (W' x)$.

    **Attributes:**

    - `scale`: $S$, of shape `(rows, num_hyper)`.
    - `weight`: $W'$, of the shape of $W$, or `None` where it is tied to $W$.
    - `axis`: which axis of $W$ counts the rows.
    """

    scale: Float[Array, "rows num_hyper"]
    weight: Array | None
    axis: int = eqx.field(static=True)

    @property
    def num_hyper(self):
        return self.scale.shape[-1]

    def check(self, general, whose):
        _check_shape(self.scale, (general.shape[self.axis],), f"`scale` in {whose}")
        weight: Any = self.weight
        if eqx.is_array(weight) and weight.shape != general.shape:
            raise ValueError(
                f"`weight` in {whose} must have the shape {general.shape} of the array "
                f"that responds; got {weight.shape}."
            )

    def effective(self, general, perturbation):
        weight = general if self.weight is None else self.weight
        return perturbation.added(general, self.scale, weight, axis=self.axis)

    def squared_norm(self, general, perturbation):
        vector = perturbation.vector.astype(self.scale.dtype)
        # Half precision overflows early: in float16 at the square of 256.
        coefficients, general, weight = tree_widened(
            (self.scale @ vector, general, self.weight)
        )
        if weight is None:
            rows = _row_products(general, general, self.axis)
            return jnp.sum((1 + coefficients) ** 2 * rows)
        crossed = _row_products(general, weight, self.axis)
        rows = _row_products(weight, weight, self.axis)
        moved = jnp.sum(coefficients * (2 * crossed + coefficients * rows))
        return tree_dot(general, general) + moved


def _row_products(a: Array, b: Array, axis: int) -> Float[Array, " rows"]:
    """The inner product of each row of `a` with that of `b`."""
    # As a batch of dots: a product that is then summed would be stored on CPUs.
    others = tuple(i for i in range(a.ndim) if i != axis)
    dimensions = (others, others), ((axis,), (axis,))
    return jax.lax.dot_general(a, b, dimensions, precision=jax.lax.Precision.HIGHEST)


class Shift(AbstractArrayResponse):
    r"""The response of a bias, or of anything small: each entry answers for itself,
    $b(\lambda) = b + T \lambda$.

    **Attributes:**

    - `shift`: $T$, of shape `(*shape, num_hyper)`.
    """

    shift: Float[Array, "*shape num_hyper"]

    @property
    def num_hyper(self):
        return self.shift.shape[-1]

    def check(self, general, whose):
        _check_shape(self.shift, general.shape, f"`shift` in {whose}")

    def effective(self, general, perturbation):
        return perturbation.added(general, self.shift)

    def squared_norm(self, general, perturbation):
        array = self.effective(general, perturbation)
        return tree_dot(array, array)


def _check_shape(array: Any, rows: tuple[int, ...], whose: str) -> None:
    if eqx.is_array(array) and array.shape[:-1] != rows:
        expected = ", ".join(map(str, (*rows, "num_hyper")))
        raise ValueError(f"{whose} must have shape ({expected}); got {array.shape}.")
