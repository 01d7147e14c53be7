"""The scale of the perturbations, as a user writes it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._core._tree import split_trainable
from .._core._types import Vector
from .._core._validate import check_tolerance
from ._perturbed import Coordinates


def check_scales(initial_scale: Any, bounds: Any) -> None:
    """Raise a `ValueError` unless these are scales, the first within the second."""
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    for bound in bounds if pair else ():
        check_tolerance(bound, "scale_bounds", optional=False)
    if not pair or not 0 < bounds[0] < bounds[1]:
        raise ValueError(
            "`scale_bounds` must be a pair of positive numbers, the smaller first; got "
            f"{bounds!r}."
        )
    for scale in jax.tree.leaves(initial_scale):
        number = np.asarray(scale)
        if isinstance(scale, bool) or not np.issubdtype(number.dtype, np.number):
            raise ValueError(f"`initial_scale` must be a number; got {scale!r}.")
        if not np.all((bounds[0] <= number) & (number <= bounds[1])):
            raise ValueError(
                f"`initial_scale` must lie within `scale_bounds`, {bounds}; got {scale!r}."
            )


def initial_log_scale(initial: Any, trainable: Vector, numbers: Array) -> Array:
    """The logarithm of the scale of each number in `hyper`, from the user's `scale`."""
    if jax.tree.structure(initial) == jax.tree.structure(0.0) and np.ndim(initial) == 0:
        return jnp.full_like(numbers, np.log(initial))
    as_array = lambda a: jnp.asarray(a, float if isinstance(a, int) else None)
    initial = split_trainable(jax.tree.map(as_array, initial))[0]
    if jax.tree.structure(initial) != jax.tree.structure(trainable):
        raise ValueError(
            "`initial_scale` must be a number or a pytree like `hyper`, of structure "
            f"{jax.tree.structure(trainable)}; got {jax.tree.structure(initial)}."
        )
    filled = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), initial, trainable)
    return jnp.log(Coordinates.vector(filled)).astype(numbers.dtype)
