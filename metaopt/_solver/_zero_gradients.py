"""The slope of an optimizer's update at gradients that are zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core._tree import tree_dtype
from .._core._types import FloatScalar, PyTree, Vector
from .._jaxpr._detach import detached, stop_gradient
from .._jaxpr._rewrite import (
    finite_derivatives,
    has_unbounded_derivatives,
    remade_entrywise,
)


Update = Callable[..., tuple[Vector, Any]]
"""`update(gradient, solver_state, params, value) -> (updates, solver_state)`."""

# A gradient counts as zero within a few roundings of the largest one.
_ROUNDINGS = 4
# Averages below this part of the largest one hold no gradient but rounding. Averages of
# squares need the room: below it, the gradient is at most a thousandth of the largest.
_NO_HISTORY = 5e-7
# A slope is steep where it predicts more than this times the change of the update.
_STEEP = 1000


def with_usable_slopes(update: Update) -> Callable[..., tuple[Vector, Any, Any]]:
    r"""`update` with finite and usable derivatives, and the number of slopes left out.

    Adam at $m = v = 0$ moves a parameter by $g / (|g| + \epsilon)$. The slope at $g = 0$
    is $1 / \epsilon$, and holds within $\epsilon$ of zero: for a gradient of any other
    size the update is a sign, of slope zero. The slope is left out at an entry where

    - the gradient is zero, or zero but for rounding,
    - so are the averages that the optimizer keeps of it, and
    - along a gradient as large as the largest of all, the slope predicts at least a
      thousand times the change that the update then makes.

    There the update is constant in the entry of the gradient and of its averages, and so is
    an average of what was divided already. Both stay differentiable in everything else,
    such as a weight decay. An update without any
    unbounded derivative is left alone, and so is one that holds a loop of unknown length,
    such as a line search.

    **Returns:**

    A function with the arguments of `update`. It returns the same updates and solver
    state to the last bit, and the number of entries whose slope was left out: `None` for
    an update that is left alone.
    """
    finite = finite_derivatives(update)

    def usable(gradient, solver_state, params, value):
        arguments = gradient, solver_state, params, value
        if not has_unbounded_derivatives(update, *arguments):
            return *finite(*arguments), None
        return remade_entrywise(select)(*arguments)

    def select(*inputs):
        gradient, solver_state, params, value = inputs
        steep, steep_state = detached(_steep, finite, *inputs)
        updates, new = finite(*inputs)
        # The compiler finds that both copies have one value, and drops the select.
        held = jax.tree.map(_held, steep, gradient), _held_state(steep, solver_state)
        flat, flat_new = finite(*held, params, value)
        updates = jax.tree.map(jnp.where, steep, flat, updates)
        new = jax.tree.map(_where_float, steep_state, flat_new, new)
        return updates, new, sum(jnp.sum(leaf) for leaf in jax.tree.leaves(steep))

    return usable


def _steep(
    update: Update,
    gradient: Vector,
    solver_state: Any,
    params: Vector,
    value: FloatScalar,
) -> tuple[PyTree, PyTree]:
    """For each entry of the gradient, and of the averages in the new solver state, whether
    its slope is left out."""
    owners = _owners(solver_state, gradient)
    zero = _zero_entries(gradient, solver_state, owners)
    # If all are zero their scale is unknown.
    size = _largest(gradient)
    size = jnp.where(size > 0, size, 1)
    along = jax.tree.map(lambda g, z: jnp.where(z, size.astype(g.dtype), 0), gradient, zero)

    def outputs(gradient):
        return update(gradient, solver_state, params, value)

    here, slope = jax.jvp(outputs, (gradient,), (along,))
    there = outputs(jax.tree.map(jnp.add, gradient, along))

    def is_steep(here, there, slope):
        if not jnp.issubdtype(here.dtype, jnp.floating):
            return jnp.zeros(here.shape, bool)
        return jnp.abs(slope) > _STEEP * jnp.abs(there - here)

    updates, averages = jax.tree.map(is_steep, here, there, slope)
    zeros, structure = jax.tree.flatten(zero)
    steep = [z & s for z, s in zip(zeros, jax.tree.leaves(updates), strict=True)]
    averages, state_structure = jax.tree.flatten(averages)
    for index, owner in enumerate(owners):
        if owner is None:
            averages[index] = jnp.zeros((), bool)
        else:
            averages[index] = averages[index] & zeros[owner]
            steep[owner] = steep[owner] | averages[index]
    return (
        jax.tree.unflatten(structure, steep),
        jax.tree.unflatten(state_structure, averages),
    )


def _zero_entries(gradient: Vector, solver_state: Any, owners: list[int | None]) -> PyTree:
    """Whether each entry of the gradient is zero but for rounding, and ever was."""
    largest = _largest(gradient)
    leaves, structure = jax.tree.flatten(gradient)
    zero = [
        jnp.abs(leaf) <= _ROUNDINGS * jnp.finfo(leaf.dtype).eps * largest for leaf in leaves
    ]
    for average, owner in zip(jax.tree.leaves(solver_state), owners, strict=True):
        if owner is not None:
            size = jnp.abs(average)
            without = size <= _NO_HISTORY * jnp.max(size, initial=0)
            zero[owner] = zero[owner] & without
    return jax.tree.unflatten(structure, zero)


def _where_float(mark: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(mark, x, y) if jnp.issubdtype(y.dtype, jnp.floating) else y


def _held(constant: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(constant, stop_gradient(x), x)


def _held_state(steep: PyTree, solver_state: Any) -> Any:
    leaves, structure = jax.tree.flatten(solver_state)
    marks = jax.tree.leaves(steep)
    leaves = [
        leaf if owner is None else _held(marks[owner], leaf)
        for leaf, owner in zip(leaves, _owners(solver_state, steep), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _owners(solver_state: Any, gradient: PyTree) -> list[int | None]:
    """For each array of a solver state, the leaf of the params that it is an average of:
    told by its path, which ends like that of the leaf, and by its shape."""
    leaves = jax.tree_util.tree_flatten_with_path(gradient)[0]

    def owner(path, average):
        if jnp.issubdtype(average.dtype, jnp.floating):
            for index, (name, leaf) in enumerate(leaves):
                if path[len(path) - len(name) :] == name and leaf.shape == average.shape:
                    return index
        return None

    return [owner(*item) for item in jax.tree_util.tree_flatten_with_path(solver_state)[0]]


def _largest(gradient: Vector) -> FloatScalar:
    dtype = tree_dtype(gradient)
    leaves = jax.tree.leaves(gradient)
    sizes = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in leaves]
    return jnp.max(jnp.stack(sizes))
