"""The interface of hyperparameters with a range."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class AbstractHyper(eqx.Module):
    """One hyperparameter: an unconstrained array, and the value that it represents.

    A leaf of `hyper` like any other array, except that a loss reads `value`, and that
    whatever is done to `raw` keeps `value` in its range. Optimizers step in `raw`,
    derivatives are taken with respect to it, and self-tuning networks perturb it: nothing
    in metaopt treats these classes differently from other pytrees of arrays.

    To write one, add a floating-point field `raw`, the property `value`, which must be
    defined at every finite `raw`, and the method `with_value`.
    """

    raw: eqx.AbstractVar[Float[Array, "..."]]

    @property
    @abc.abstractmethod
    def value(self) -> Float[Array, "..."]:
        """The value that a loss reads, of the shape and dtype of `raw`."""

    @abc.abstractmethod
    def with_value(self, value: ArrayLike) -> "AbstractHyper":
        """Make one of the same kind and range that represents another value.

        **Arguments:**

        - `value`: as for the constructor.

        **Returns:**

        A new hyperparameter; this one stays as it is.

        **Raises:**

        `ValueError` if the value is out of range.
        """

    def __repr__(self) -> str:
        settings = [
            f"{field.name}={vars(self)[field.name]!r}"
            for field in dataclasses.fields(self)
            if field.name != "raw"
        ]
        known = isinstance(self.raw, jax.Array | np.ndarray)
        parts = [_shown(self.value if known else self.raw), *settings]
        return f"{type(self).__name__}({', '.join(parts)})"


_MAX_SHOWN = 6  # numbers of an array


def _shown(value: Any) -> str:
    """A value in a few words."""
    if not isinstance(value, jax.Array | np.ndarray) or isinstance(value, jax.core.Tracer):
        return repr(value)
    numbers = np.asarray(value, float)
    if numbers.ndim == 0:
        return f"{float(numbers):.4g}"
    if numbers.size <= _MAX_SHOWN:
        return np.array2string(numbers, precision=4, separator=", ").replace("\n", "")
    return f"{numbers.min():.4g} to {numbers.max():.4g}, shape {numbers.shape}"
