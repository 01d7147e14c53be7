"""Batch normalisation without model state."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core._tree import tree_widened
from .._core._types import Key
from .._core._validate import check_count, check_tolerance


class BatchNorm(eqx.Module):
    """Batch normalisation by the batch at hand, in training and at test time alike.

    Transductive, in the words of few-shot learning: there are no running statistics, so the
    prediction for one example depends on the others, and there is no model state. For
    running statistics use `equinox.nn.BatchNorm` and a `state_policy` of the inner solver.

    The batch is the axis of a `jax.vmap` that is named: `jax.vmap(model,
    axis_name="batch")`.

    **Arguments:**

    - `num_channels`: the length of the leading axis of one example.
    - `axis_name`: the name of the axis of the batch.
    - `eps`: what is added to the variance, 0 or more.

    **Raises:**

    `ValueError` where arguments do not fit; when called, for another number of channels,
    outside of a `jax.vmap` over that axis, and for a batch of one number a channel, which
    would become zero whatever it is.

    !!! example

        ```python
        import jax
        import jax.numpy as jnp
        import metaopt as mo

        norm = mo.nn.BatchNorm(3)
        x = jnp.arange(24.0).reshape(2, 3, 4)
        jax.vmap(norm, axis_name="batch")(x)
        ```
    """

    weight: Float[Array, " num_channels"]
    bias: Float[Array, " num_channels"]
    axis_name: str = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, num_channels: int, axis_name: str = "batch", eps: float = 1e-5):
        check_count(num_channels, "num_channels")
        check_tolerance(eps, "eps", optional=False)
        self.weight = jnp.ones(num_channels)
        self.bias = jnp.zeros(num_channels)
        self.axis_name = axis_name
        self.eps = eps

    def __call__(
        self, x: Float[Array, "num_channels ..."], *, key: Key | None = None
    ) -> Float[Array, "num_channels ..."]:
        """The normalised example.

        **Arguments:**

        - `x`: one example of the batch, channels first.
        - `key`: ignored; for compatibility with the layers of Equinox.

        **Returns:**

        An array like `x`.
        """
        if x.ndim == 0 or x.shape[0] != self.weight.size:
            raise ValueError(
                f"`BatchNorm` takes {self.weight.size} channels, along the leading axis of "
                f"one example; got shape {x.shape}."
            )
        pixels = tuple(range(1, x.ndim))
        if self._size_of_batch() * math.prod(x.shape[1:]) < 2:
            raise ValueError(
                "`BatchNorm` makes zero of a batch of one example with one number a "
                "channel, whatever it is. Give it more examples at a time, as in "
                "`num_ways * num_shots` of a task."
            )
        mean = lambda a: jax.lax.pmean(jnp.mean(a, pixels, keepdims=True), self.axis_name)
        wide = tree_widened(x)  # squares overflow in half precision
        centred = wide - mean(wide)
        scale = jax.lax.rsqrt(mean(centred**2) + self.eps)
        as_channels = lambda a: a.reshape(-1, *(1 for _ in pixels))
        out = centred * (scale * as_channels(self.weight)) + as_channels(self.bias)
        return out.astype(x.dtype)

    def _size_of_batch(self) -> int:
        try:
            return jax.lax.psum(1, self.axis_name)
        except NameError as error:
            name = self.axis_name
            raise ValueError(
                f"`BatchNorm` normalises over the axis named {name!r}, and there is none: "
                f"call the model under `jax.vmap(model, axis_name={name!r})`."
            ) from error
