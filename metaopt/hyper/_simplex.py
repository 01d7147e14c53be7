"""Shares that sum to one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._base import AbstractHyper
from ._initial import initial_raw


_ATOL = 1e-3  # of the sum of what a user writes


class Simplex(AbstractHyper):
    r"""Shares that are positive and sum to one along the last axis:
    $value = \mathrm{softmax}(raw)$.

    For the weights of a mixture: of losses, of domains of data, of augmentations, of the
    operations of an architecture. A share close to zero moves slowly away from there. To
    weigh examples each for itself, use [`metaopt.hyper.Interval`][].

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo

        hyper = {"mix": mo.hyper.Simplex(jnp.full(3, 1 / 3))}

        def inner_loss(params, hyper, batch):
            losses = jnp.stack([jnp.mean((params - part) ** 2) for part in batch])
            return hyper["mix"].value @ losses
        ```

    **Arguments:**

    - `value`: the initial shares, an array of shape `(..., n)`, each more than 0. Their
        sums may be off by a thousandth, and are then made 1. It keeps its dtype if that is
        a floating-point one.

    **Raises:**

    `ValueError` if a share is not positive, or if a sum is not 1.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        if np.ndim(value) == 0:
            raise ValueError("`value` must have an axis, along which the shares sum to 1.")

        def invert(value):
            off = jnp.abs(jnp.sum(value, axis=-1, keepdims=True) - 1) > _ATOL
            return jnp.where(off, jnp.nan, jnp.log(value))

        requirement = "must be positive, and sum to 1 along the last axis"
        self.raw = initial_raw(value, invert, requirement)

    def with_value(self, value):
        return Simplex(value)

    @property
    def value(self) -> Float[Array, "..."]:
        """The shares that a loss reads."""
        return jax.nn.softmax(self.raw, axis=-1)
