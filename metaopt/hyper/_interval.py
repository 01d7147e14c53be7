"""A number between two bounds."""

import equinox as eqx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._base import AbstractHyper
from ._initial import canonical_range, initial_raw
from ._squash import squashed, unsquashed


class Interval(AbstractHyper):
    r"""A number between two bounds: $value = low + (high - low)\, \sigma(raw)$ with
    $\sigma(x) = 1 / (1 + e^{-x})$.

    For a share, a probability, a momentum, or any number that is meaningless beyond its
    bounds. Close to a bound the derivative with respect to `raw` goes to zero, so a number
    that ends up there moves away slowly.

    !!! example

        ```python
        import metaopt as mo

        hyper = {"smoothing": mo.hyper.Interval(0.1, low=0.0, high=0.5)}

        def soft_labels(one_hot, hyper):
            share = hyper["smoothing"].value
            return (1 - share) * one_hot + share / one_hot.shape[-1]
        ```

    **Arguments:**

    - `value`: the initial value, strictly between the bounds: a number, or an array of any
        shape. It keeps its dtype if that is a floating-point one.
    - `low`, `high`: the bounds, Python numbers, the same for all entries.

    **Raises:**

    `ValueError` if the bounds are not finite numbers in this order, or if an entry of
    `value` is not between them in its dtype: 0.99999999 is 1 in float32.
    """

    raw: Float[Array, "..."]
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __init__(self, value: ArrayLike, low: float, high: float):
        self.low, self.high = low, high = canonical_range(low, high)
        self.raw = initial_raw(
            value,
            lambda value: unsquashed(value, low, high),
            f"must lie between `low` and `high`, {low!r} and {high!r}, and not at an end, "
            "where its derivative is zero",
        )

    def with_value(self, value):
        return Interval(value, self.low, self.high)

    @property
    def value(self) -> Float[Array, "..."]:
        """The number that a loss reads, between `low` and `high`."""
        return squashed(self.raw, self.low, self.high)
