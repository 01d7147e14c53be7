"""From all numbers to those between two bounds, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def squashed(raw: Float[Array, "..."], low: float, high: float) -> Float[Array, "..."]:
    r"""$low + (high - low)\, \sigma(raw)$ with $\sigma(x) = 1 / (1 + e^{-x})$."""
    width = high - low
    # From the nearer bound, so that none is ever crossed by rounding, and numbers that are
    # close to `high` are told apart as well as those close to `low`.
    return jnp.where(
        raw < 0,
        low + width * jax.nn.sigmoid(raw),
        high - width * jax.nn.sigmoid(-raw),
    )


def unsquashed(value: Float[Array, "..."], low: float, high: float) -> Float[Array, "..."]:
    """The inverse of `squashed`. Infinite or NaN unless `value` is between the bounds."""
    width = high - low
    # Not the logit of a quotient, which cancels at `high`.
    return jnp.log((value - low) / width) - jnp.log((high - value) / width)
