"""Outer variables that stay as they are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import split_trainable
from .._core._types import PyTree
from .._core._validate import canonical_hyper
from ._base import AbstractHyper, values


class Frozen(eqx.Module):
    """A part of `hyper` that is not tuned, and that another run may tune.

    Losses read `value` as they would without. The numbers are kept as bits, so that they
    are no floating-point arrays: no derivative is taken with respect to them, no optimizer
    sees them, and a self-tuning network does not perturb them. Another value compiles
    nothing anew.

    !!! example

        ```python
        import metaopt as mo

        hyper = {"rate": mo.hyper.Positive(0.1), "decay": mo.hyper.Positive(1e-3)}
        hyper["decay"] = mo.hyper.Frozen(hyper["decay"])  # tune the rate alone
        hyper["decay"] = hyper["decay"].thawed  # and then both
        ```

    **Arguments:**

    - `tree`: a hyperparameter such as a [`metaopt.hyper.Positive`][], an array, or a pytree
        of them.

    **Raises:**

    `ValueError` or `TypeError` for what could not be tuned either.
    """

    bits: PyTree
    rest: PyTree
    dtypes: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, tree: PyTree):
        floats, self.rest = split_trainable(canonical_hyper(tree, "tree"))
        self.dtypes = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(floats))
        self.bits = jax.tree.map(_as_bits, floats)

    @property
    def thawed(self) -> PyTree:
        """The part of `hyper` that was frozen, to be tuned again."""
        leaves, structure = jax.tree.flatten(self.bits)
        floats = [
            jax.lax.bitcast_convert_type(leaf, dtype)
            for leaf, dtype in zip(leaves, self.dtypes, strict=True)
        ]
        return eqx.combine(jax.tree.unflatten(structure, floats), self.rest)

    @property
    def value(self) -> Any:
        """The value of a hyperparameter, an array, or a pytree of them, for losses."""
        return values(self.thawed)

    def __repr__(self) -> str:
        return f"Frozen({self.thawed!r})"


def thaw(tree: PyTree) -> PyTree:
    """Replace every [`metaopt.hyper.Frozen`][] of a pytree by what it holds.

    **Arguments:**

    - `tree`: any pytree, such as `hyper`.

    **Returns:**

    A pytree without frozen parts.
    """
    is_frozen = lambda node: isinstance(node, Frozen)
    thawed = lambda node: node.thawed if isinstance(node, Frozen) else node
    return jax.tree.map(thawed, tree, is_leaf=is_frozen)


def freeze(tree: PyTree, kind: type[AbstractHyper]) -> PyTree:
    """Replace every hyperparameter of one kind by a [`metaopt.hyper.Frozen`][] one.

    **Arguments:**

    - `tree`: any pytree, such as `hyper`.
    - `kind`: a class such as [`metaopt.hyper.Integer`][].

    **Returns:**

    A pytree whose hyperparameters of that kind are frozen.
    """
    is_kind = lambda node: isinstance(node, kind | Frozen)
    frozen = lambda node: Frozen(node) if isinstance(node, kind) else node
    return jax.tree.map(frozen, tree, is_leaf=is_kind)


def _as_bits(x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, dtype)
