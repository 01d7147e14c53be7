"""Numbers in increasing order."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._base import AbstractHyper
from ._initial import initial_raw


class Ordered(AbstractHyper):
    r"""Numbers that increase along the last axis: the first of `raw`, and each of the
    others larger by $\exp(raw_i)$ than the one before.

    For thresholds, bin edges, quantiles, the milestones of a schedule.

    !!! example

        ```python
        import jax
        import jax.numpy as jnp
        import metaopt as mo

        hyper = {"edges": mo.hyper.Ordered(jnp.array([-1.0, 0.0, 1.0]))}

        def probabilities(score, hyper):  # of four ordered classes
            below = jax.nn.sigmoid(hyper["edges"].value - score)
            return jnp.diff(below, prepend=0.0, append=1.0)
        ```

    **Arguments:**

    - `value`: the initial numbers, an array of shape `(..., n)`, strictly increasing along
        the last axis. It keeps its dtype if that is a floating-point one.

    **Raises:**

    `ValueError` if the numbers do not increase, or are not finite.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        if np.ndim(value) == 0:
            raise ValueError("`value` must have an axis, along which the numbers increase.")

        def invert(value):
            steps = jnp.log(jnp.diff(value, axis=-1))
            return jnp.concatenate([value[..., :1], steps], axis=-1)

        self.raw = initial_raw(value, invert, "must be larger than the number before it")

    def with_value(self, value):
        return Ordered(value)

    @property
    def value(self) -> Float[Array, "..."]:
        """The numbers that a loss reads, in increasing order."""
        steps = jnp.exp(self.raw[..., 1:])
        return jnp.cumsum(jnp.concatenate([self.raw[..., :1], steps], axis=-1), axis=-1)
