"""Sums of cotangents, in at least float32."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._tree import wide_dtype
from ..._core._types import PyTree


def partitioned(held: PyTree, moving: Any) -> tuple[PyTree, PyTree]:
    """The floating-point arrays that are differentiated, and everything else.

    **Arguments:**

    - `held`: a pytree.
    - `moving`: which of its arrays are differentiated, as in `equinox.partition`.
    """
    wanted, fixed = eqx.partition(held, moving)
    wanted, rest = eqx.partition(wanted, eqx.is_inexact_array)
    return wanted, eqx.combine(fixed, rest)


def wide_zeros(tree: PyTree) -> list[jax.Array]:
    """Zeros to sum in, in at least float32."""
    return [jnp.zeros(leaf.shape, wide_dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def added(sums: list[jax.Array], terms: list[jax.Array]) -> list[jax.Array]:
    """`sums + terms`, in the dtypes of the sums."""
    return [a + b.astype(a.dtype) for a, b in zip(sums, terms, strict=True)]


def in_dtypes(leaves: list[jax.Array], like: PyTree) -> PyTree:
    """Leaves as a pytree with the structure and the dtypes of another."""
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    leaves = [leaf.astype(a.dtype) for leaf, a in pairs]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def or_zeros(tree: PyTree, like: PyTree) -> PyTree:
    """The tree, or zeros like another where it is `None`."""
    if tree is None:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    return tree
