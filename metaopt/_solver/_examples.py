"""Vectors that hold one fixed point, or one for each entry of their leading axis."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._tree import summed, tree_dtype, tree_zeros_like, with_auto_axes
from .._core._types import Vector


class Examples(eqx.Module):
    """Whether there is one fixed point or one for each entry of the leading axis.

    **Attributes:**

    - `shape`: that of what there is one of for each fixed point: `()` or `(n,)`.
    """

    shape: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, params: Vector, per_example: bool) -> "Examples":
        """Those of some params.

        **Raises:**

        `ValueError` where a leaf has no such axis.
        """
        if not per_example:
            return cls(())
        leaves = jax.tree.leaves(params)
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
        if len(sizes) != 1 or None in sizes:
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ValueError(
                "With `per_example=True` the arrays of the params must share their leading "
                f"axis, the one of examples; got shapes {shapes}."
            )
        return cls((leaves[0].shape[0],))

    def dot(self, x: Vector, y: Vector) -> Array:
        """The inner product of each."""
        dtype = tree_dtype(x)

        def leaf(a, b):
            return summed(a.astype(dtype) * b.astype(dtype), len(self.shape))

        return ft.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, x, y)))

    def norm(self, x: Vector) -> Array:
        """The Euclidean norm of each."""
        return jnp.sqrt(self.dot(x, x))

    def where(self, condition: Array, x: Vector, y: Vector) -> Vector:
        """`x` where the condition of an example holds, else `y`."""
        return jax.tree.map(
            lambda a, b: jnp.where(self._expanded(condition, a.ndim), a, b), x, y
        )

    def axpy(self, factors: Array, x: Vector, y: Vector) -> Vector:
        """`factors * x + y`, each leaf in the dtype of `y`."""
        return jax.tree.map(
            lambda a, b: self._expanded(factors, a.ndim).astype(b.dtype) * a + b, x, y
        )

    def scale(self, factors: Array, x: Vector) -> Vector:
        """`factors * x`, each leaf in its own dtype."""
        return jax.tree.map(
            lambda a: self._expanded(factors, a.ndim).astype(a.dtype) * a, x
        )

    def rooms(self, x: Vector, count: int) -> Vector:
        """Room for `count` of `x`: zeros on a new axis, which follows the first axis of
        arrays with several. So the products of each row lie side by side; on a leading
        axis XLA would copy a history before each product."""

        def room(a):
            axis = self._history_axis(a.ndim)
            shape = (*a.shape[:axis], count, *a.shape[axis:])
            kept = tuple(i for i in range(a.ndim + 1) if i != axis)
            return jax.lax.broadcast_in_dim(a, shape, kept)

        return jax.tree.map(room, tree_zeros_like(x))

    def put(self, history: Vector, slot: Array, x: Vector) -> Vector:
        """A history with one entry replaced by `x`; each example has a slot of its own
        where `slot` has an axis."""

        def put(h, a):
            axis = self._history_axis(a.ndim)
            if slot.ndim == 0:
                return jax.lax.dynamic_update_index_in_dim(h, a, slot, axis)
            place = jnp.arange(self.shape[0]), slot
            return h.at[place].set(a, mode="promise_in_bounds")

        return jax.tree.map(put, history, x)

    def entry(self, history: Vector, slot: Array) -> Vector:
        """The entry of a history in a slot."""
        take = lambda h: jax.lax.dynamic_index_in_dim(
            h, slot, self._history_axis(h.ndim - 1), keepdims=False
        )
        return jax.tree.map(take, history)

    def products(self, history: Vector, x: Vector) -> Array:
        """The inner products of each entry of a history with a vector: an array of shape
        `(*self.shape, m)`."""
        dtype = tree_dtype(history)

        def leaf(h, a):
            axis = self._history_axis(a.ndim)
            kept, summed = tuple(range(axis)), tuple(range(axis, a.ndim))
            dims = (tuple(i + 1 for i in summed), summed), (kept, kept)
            rows = jax.lax.dot_general(
                *(h, a, dims),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            )
            return jnp.sum(rows, tuple(range(len(self.shape), axis)))

        def products(history, x):
            return ft.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, history, x)))

        return with_auto_axes(products, history, x)

    def combined(self, weights: Array, history: Vector) -> Vector:
        """The sum over a history by weights of shape `(*self.shape, m)`."""

        def leaf(h):
            # Term by term: on CPUs a product would take two or three times as long.
            entries = self._entries(h)
            terms = (self._weighed(weights, i, h) * entry for i, entry in entries)
            return ft.reduce(jnp.add, terms)

        return jax.tree.map(leaf, history)

    def combined_differences(self, weights: Array, history: Vector) -> Vector:
        """The sum over the differences of each entry of a history to the one before, the
        last entry being before the first."""

        def leaf(h):
            entries = [entry for _, entry in self._entries(h)]
            after = entries[1:] + entries[:1]
            terms = (
                self._weighed(weights, i, h) * (new - old)
                for i, (old, new) in enumerate(zip(entries, after, strict=True))
            )
            return ft.reduce(jnp.add, terms)

        return jax.tree.map(leaf, history)

    def _history_axis(self, ndim: int) -> int:
        return max(len(self.shape), min(ndim - 1, 1))

    def _entries(self, h: Array) -> list[tuple[int, Array]]:
        axis = self._history_axis(h.ndim - 1)
        take = lambda i: jax.lax.index_in_dim(h, i, axis, keepdims=False)
        return [(i, take(i)) for i in range(h.shape[axis])]

    def _weighed(self, weights: Array, i: int, h: Array) -> Array:
        return self._expanded(weights[..., i], h.ndim - 1).astype(h.dtype)

    def _expanded(self, x: Array, ndim: int) -> Array:
        return x.reshape(*self.shape, *(1,) * (ndim - len(self.shape)))
