"""Vectors that hold one fixed point, or one for each entry of their leading axis."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._tree import tree_dtype, with_auto_axes
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
            axes = tuple(range(len(self.shape), a.ndim))
            return jnp.sum(a.astype(dtype) * b.astype(dtype), axes)

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

    def products(self, history: Vector, x: Vector) -> Array:
        """The inner products of each entry of a history, `(m, *leaf.shape)`, with a
        vector: an array of shape `(*self.shape, m)`."""
        dtype, given = tree_dtype(history), len(self.shape)

        def leaf(h, a):
            # A product for each row, and their sum: over all axes at once the history
            # would be copied into another shape.
            batched = max(given, min(a.ndim - 1, 1))
            kept, summed = tuple(range(batched)), tuple(range(batched, a.ndim))
            after = lambda axes: tuple(axis + 1 for axis in axes)
            dims = (after(summed), summed), (after(kept), kept)
            rows = jax.lax.dot_general(h, a, dims, preferred_element_type=dtype)
            return jnp.sum(rows, tuple(range(given, batched)))

        def products(history, x):
            return ft.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, history, x)))

        return with_auto_axes(products, history, x)

    def combined(self, weights: Array, history: Vector) -> Vector:
        """The sum over a history, of leaves `(m, *shape)`, by weights of shape
        `(*self.shape, m)`."""

        def leaf(h):
            # Term by term: on CPUs a product would take two or three times as long.
            terms = (
                self._expanded(weights[..., i], h.ndim - 1).astype(h.dtype) * h[i]
                for i in range(h.shape[0])
            )
            return ft.reduce(jnp.add, terms)

        return jax.tree.map(leaf, history)

    def _expanded(self, x: Array, ndim: int) -> Array:
        return x.reshape(*self.shape, *(1,) * (ndim - len(self.shape)))
