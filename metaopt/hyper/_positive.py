"""A positive number."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._base import AbstractHyper
from ._initial import initial_raw


class Positive(AbstractHyper):
    r"""A positive number: $value = \exp(raw)$.

    For what is a matter of orders of magnitude: a penalty, a learning rate, a length scale,
    the weight of an example. The same step of an optimizer multiplies a small number and a
    large one by the same factor. For a number that may become zero, use
    [`metaopt.hyper.Interval`][].

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo

        hyper = {"l2": mo.hyper.Positive(1e-3), "lr": mo.hyper.Positive(0.1)}

        def inner_loss(params, hyper, batch):
            return jnp.sum((batch @ params) ** 2) + hyper["l2"].value * params @ params
        ```

    **Arguments:**

    - `value`: the initial value, more than 0: a number, or an array of any shape. It keeps
        its dtype if that is a floating-point one.

    **Raises:**

    `ValueError` if an entry of `value` is not a positive, finite number.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        requirement = "must be positive (where it may be 0, use `metaopt.hyper.Interval`)"
        self.raw = initial_raw(value, jnp.log, requirement)

    def with_value(self, value):
        return Positive(value)

    @property
    def value(self) -> Float[Array, "..."]:
        """The positive number that a loss reads."""
        return jnp.exp(self.raw)
