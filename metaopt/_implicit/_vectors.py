"""Vectors that users hand over, checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core._tree import split_trainable, tree_cast_like, tree_structs
from .._core._types import Vector


def like(vector: Vector, expected: Vector, name: str, of: str, axes: int = 0) -> Vector:
    """A vector in the dtypes of another, with so many more axes in front."""
    given = floats_of(vector)
    leaves, structure = jax.tree.flatten(given)
    shapes = [jnp.shape(leaf)[axes:] for leaf in leaves]
    expected_shapes = [leaf.shape for leaf in jax.tree.leaves(expected)]
    if structure != jax.tree.structure(expected) or shapes != expected_shapes:
        more = ", with one more axis in front of each leaf" if axes else ""
        raise ValueError(
            f"`{name}` must have the structure and the shapes of the floating-point "
            f"arrays of `{of}`, {tree_structs(expected)}{more}; got {tree_structs(given)}."
        )
    return tree_cast_like(given, expected)


def floats_of(tree: Any) -> Vector:
    """The floating-point arrays of a pytree, those of NumPy and Python floats included."""
    numbers = float | np.ndarray | np.generic
    arrays = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, numbers) else x, tree)
    return split_trainable(arrays)[0]
