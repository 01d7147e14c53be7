"""A whole number, which has no derivative."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._base import AbstractHyper
from ._initial import canonical_range, initial_raw
from ._rounding import rounded_down
from ._squash import squashed, unsquashed


# Up to here the numbers, and as many levels of the sigmoid, are told apart in float32.
_LARGEST = 1_000_000

_NO_DERIVATIVE = (
    "The `value` of a `metaopt.hyper.Integer` is differentiated with respect to `raw`. A "
    "whole number has no derivative: it would be zero whatever the problem, along a path "
    "as well as by implicit differentiation. Tune it with `metaopt.SelfTuningSolver`, "
    "which perturbs it instead (by `STN()`, if a criterion reads it; check its response "
    "with `check_response(step=0.3)`); read `.relaxed`, "
    "which has a derivative, in place of `.value`; or hold it constant: "
    "`jax.lax.stop_gradient(hyper.x).value`, or `metaopt.hyper.freeze(hyper, "
    "metaopt.hyper.Integer)`, as `metaopt.study.Hybrid` does to search over it."
)


class Integer(AbstractHyper):
    r"""A whole number: of all from $low$ to $high$, the one nearest to
    $relaxed = low - \frac12 + (high - low + 1)\, \sigma(raw)$.

    For what can be counted: the holes that are cut out of an image, the steps of an
    augmentation. Each number has the same share of the range of the sigmoid, so both ends
    are reached at finite `raw`.

    `value` has no derivative with respect to `raw`, and asking for one is an error rather
    than a zero. Tune it by a method that perturbs `raw` and compares losses, such as
    `metaopt.SelfTuningSolver`. If a number in between makes sense in the loss, read
    `relaxed` and tune that by its derivative. All other derivatives pass freely.

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo

        hyper = {"holes": mo.hyper.Integer(2, low=0, high=5)}

        def cut_out(image, hyper, masks):
            used = jnp.arange(5) < hyper["holes"].value
            return image * jnp.all(masks | ~used[:, None, None], axis=0)
        ```

    **Arguments:**

    - `value`: the initial value, a whole number from `low` to `high`: an int, or an array
        of any shape. A floating-point dtype is kept, from float32 on.
    - `low`, `high`: the least and the greatest value, Python ints, the same for all
        entries; at most a million in size.

    **Raises:**

    `ValueError` if the bounds are not such numbers, or if an entry of `value` is not a
    whole number between them; and where `value` is differentiated with respect to `raw`:
    in reverse mode when that is traced, in forward mode when it is compiled.
    """

    raw: Float[Array, "..."]
    low: int = eqx.field(static=True)
    high: int = eqx.field(static=True)

    def __init__(self, value: ArrayLike, low: int, high: int):
        self.low, self.high = low, high = _canonical_whole_range(low, high)

        def invert(value):
            raw = unsquashed(value, low - 0.5, high + 0.5)
            return jnp.where(jnp.round(value) == value, raw, jnp.nan)

        requirement = f"must be a whole number from {low} to {high}"
        self.raw = initial_raw(value, invert, requirement, wide=True)

    def with_value(self, value):
        return Integer(value, self.low, self.high)

    @property
    def value(self) -> Float[Array, "..."]:
        """The whole number that a loss reads, as a floating-point array.

        Not as an array of integers, which could not say that `raw` is NaN.
        """
        num_levels = self.high - self.low + 1
        level = rounded_down(squashed(self.raw, 0, num_levels), _NO_DERIVATIVE)
        return self.low + jnp.minimum(level, num_levels - 1)

    @property
    def relaxed(self) -> Float[Array, "..."]:
        """The number that is rounded, between `low - 0.5` and `high + 0.5`. It has a
        derivative with respect to `raw`."""
        return squashed(self.raw, self.low - 0.5, self.high + 0.5)


def _canonical_whole_range(low, high) -> tuple[int, int]:
    for name, number in (("low", low), ("high", high)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"`{name}` must be an int; got {number!r}.")
        if abs(int(number)) > _LARGEST:
            raise ValueError(
                f"`{name}` must be at most {_LARGEST:,} in size; got {number!r}. Use "
                "`metaopt.hyper.Interval` for a number so large."
            )
    canonical_range(low, high)
    return int(low), int(high)
