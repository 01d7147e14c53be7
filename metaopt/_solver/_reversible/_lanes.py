"""Runs of many examples at once, which share some of their inputs.

Under `jax.vmap` a loop has its own sum of cotangents for each example, of arrays that all
examples share as well: of the weights of a layer, say, which takes as much memory as there
are examples, and adds them up at the end. A run that knows which of its arrays are shared
calls for one sum.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._types import BoolScalar, PyTree


Axes = tuple[int | None, ...]
"""For each array of a pytree, 0 where it has a leading axis of examples, else `None`."""


class Level(eqx.Module):
    """One `jax.vmap` around a run: which of its arrays have an axis of examples.

    **Attributes:**

    - `forward`, `evaluate`, `draws`, `params`, `others`: the axes of each part.
    - `axis_name`: the name of the axis, for collective operations.
    """

    forward: Axes = eqx.field(static=True)
    evaluate: Axes = eqx.field(static=True)
    draws: Axes = eqx.field(static=True)
    params: Axes = eqx.field(static=True)
    others: Axes = eqx.field(static=True)
    axis_name: Any = eqx.field(static=True)


Levels = tuple[Level, ...]
"""From the innermost to the outermost. Arrays have the axis of the last one first."""


def over(
    levels: Levels, axes_of: Callable[[Level], Axes], fn: Callable[..., Any], *args: Any
) -> Any:
    """`fn(*args)` for all examples of all levels.

    **Arguments:**

    - `levels`: the levels.
    - `axes_of`: the axes of the arrays of `args` at a level; those that are left out at
        the end are 0.
    - `fn`: a function for one example, which returns arrays.
    """
    if not levels:
        return fn(*args)
    *inner, outer = levels
    arrays, static = eqx.partition(args, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    axes = [*axes_of(outer)]
    axes += [0] * (len(leaves) - len(axes))

    def one(leaves):
        args = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        return over(tuple(inner), axes_of, fn, *args)

    return jax.vmap(one, in_axes=(axes,), axis_name=outer.axis_name)(leaves)


def summed_where_shared(levels: Levels, axes: list[Axes], tree: PyTree) -> PyTree:
    """The sum over the examples that share an array, of one array for each.

    **Arguments:**

    - `levels`: the levels.
    - `axes`: for each level, the axes of the arrays of `tree`.
    - `tree`: a pytree of arrays with an axis for each level.
    """
    leaves, structure = jax.tree.flatten(tree)
    shared = [_shared(levels, axes, i) for i in range(len(leaves))]
    leaves = [jnp.sum(leaf, dims) for leaf, dims in zip(leaves, shared, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def nan_unless(
    succeeded: BoolScalar, levels: Levels, axes: list[Axes], tree: PyTree
) -> PyTree:
    """Set to NaN every cotangent that a failed example contributes to.

    **Arguments:**

    - `succeeded`: whether, for each example; an axis for each level.
    - `levels`, `axes`: as in `summed_where_shared`.
    - `tree`: a pytree of arrays, some of which examples share.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [
        jnp.where(
            expanded(jnp.all(succeeded, _shared(levels, axes, i)), a.ndim), a, jnp.nan
        )
        for i, a in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, leaves)


def beside_arrays(tree: PyTree, whole: PyTree) -> list[Any]:
    """Pick the entries of one pytree, `None` included, at the array positions of another
    of the same structure."""
    leaves = [jax.tree.leaves(t, is_leaf=lambda x: x is None) for t in (tree, whole)]
    return [leaf for leaf, array in zip(*leaves, strict=True) if eqx.is_array(array)]


def expanded(x: jax.Array, ndim: int) -> jax.Array:
    """An array with trailing axes of length one."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def _shared(levels: Levels, axes: list[Axes], index: int) -> tuple[int, ...]:
    """The levels at which an array has no axis of examples."""
    outermost_first = [of_level[index] for of_level in reversed(axes)]
    assert len(outermost_first) == len(levels)
    return tuple(i for i, axis in enumerate(outermost_first) if axis is None)
