"""Outer variables that stay as they are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._types import PyTree
from .._core._validate import canonical_hyper
from ._base import AbstractHyper


class Frozen(eqx.Module):
    """A part of `hyper` that is not tuned, and that another run may tune.

    Losses read `value` as they would without. A [`metaopt.hyper.PerLeaf`][] or a schedule,
    which has methods of its own, is read by `thawed`, which has no derivative either. The
    numbers are kept as bits, so that they
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

    leaves: tuple[Any, ...]
    dtypes: tuple[str | None, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    def __init__(self, tree: PyTree):
        leaves, self.structure = jax.tree.flatten(canonical_hyper(tree, "tree"))
        is_float = [eqx.is_inexact_array(leaf) for leaf in leaves]
        dtype_of = lambda leaf, known: str(leaf.dtype) if known else None
        self.dtypes = tuple(map(dtype_of, leaves, is_float))
        as_bits = lambda leaf, known: _as_bits(leaf) if known else leaf
        self.leaves = tuple(map(as_bits, leaves, is_float))

    @property
    def thawed(self) -> PyTree:
        """The part of `hyper` that was frozen, to be tuned again."""
        thaw = lambda leaf, dtype: (
            leaf if dtype is None else jax.lax.bitcast_convert_type(leaf, dtype)
        )
        return jax.tree.unflatten(self.structure, map(thaw, self.leaves, self.dtypes))

    @property
    def value(self) -> Any:
        """The value of a hyperparameter, an array, or a pytree of them, for losses."""
        return values(self.thawed)

    def __repr__(self) -> str:
        return f"Frozen({self.thawed!r})"


def values(tree: PyTree) -> PyTree:
    """Return the values of hyperparameters, to be printed, drawn or written to a file.

    !!! example

        ```python
        import jax
        import metaopt as mo

        hyper = {"l2": mo.hyper.Positive(0.5), "holes": mo.hyper.Integer(3, 0, 8)}
        print(jax.tree.map(lambda a: a.tolist(), mo.hyper.values(hyper)))
        ```

    **Arguments:**

    - `tree`: any pytree, such as `hyper` as a solver returns it.

    **Returns:**

    `tree` with every [`metaopt.hyper.AbstractHyper`][] and [`metaopt.hyper.Frozen`][]
    replaced by its `value`, and everything else as it is.
    """
    return jax.tree.map(
        lambda node: node.value if isinstance(node, AbstractHyper | Frozen) else node,
        tree,
        is_leaf=lambda node: isinstance(node, AbstractHyper | Frozen),
    )


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

    **Raises:**

    `ValueError` for a `kind` that is no class.
    """
    if not isinstance(kind, type):
        raise ValueError(
            "`kind` must be a class such as `metaopt.hyper.Integer`; got "
            f"{kind!r}. To freeze one part by its name write "
            "`hyper['rate'] = metaopt.hyper.Frozen(hyper['rate'])`."
        )
    is_kind = lambda node: isinstance(node, kind | Frozen)
    frozen = lambda node: Frozen(node) if isinstance(node, kind) else node
    return jax.tree.map(frozen, tree, is_leaf=is_kind)


def _as_bits(x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, dtype)
