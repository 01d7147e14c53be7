"""Batches in groups of rows that each see a perturbation of the outer variables."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._core._tree import split_trainable
from .._core._types import Batch, Hyper, Key, ModelState, PyTree


Numbers = Float[Array, " num_hyper"]


class Coordinates(eqx.Module):
    """The floating-point numbers in `hyper` as one vector, and the inverse map.

    **Arguments:**

    - `hyper`: the outer variables.
    - `answered`: for each floating-point leaf of it whether the inner solution depends on
        it; by default on all.
    """

    unravel: Callable[[Array], PyTree] = eqx.field(static=True)
    rest: PyTree
    mask: Array

    def __init__(self, hyper: Hyper, answered: list[bool] | None = None):
        trainable, self.rest = split_trainable(hyper)
        self.unravel = ravel_pytree(trainable)[1]
        leaves = jax.tree.leaves(trainable)
        marks = [True] * len(leaves) if answered is None else answered
        self.mask = jnp.concatenate(
            [jnp.full(leaf.size, mark) for leaf, mark in zip(leaves, marks, strict=True)]
        )

    def seen(self, vector: Float[Array, "... num_hyper"]) -> Float[Array, "... num_hyper"]:
        """The input of a best-response network: zero for a number that the inner solution
        does not depend on, whose response would be noise."""
        return jnp.where(self.mask, vector, 0)

    @staticmethod
    def vector(hyper: Hyper) -> Numbers:
        """The floating-point numbers in `hyper`."""
        return ravel_pytree(split_trainable(hyper)[0])[0]

    def trainable(self, vector: Numbers) -> PyTree:
        """The trainable part of `hyper` from its numbers."""
        return self.unravel(vector)

    def hyper(self, vector: Numbers) -> Hyper:
        """`hyper` from its numbers."""
        return eqx.combine(self.trainable(vector), self.rest)


class Groups(eqx.Module):
    """A batch cut into groups of rows, each to see a perturbation of its own.

    **Attributes:**

    - `arrays`: those with a leading axis of rows, of shape `(num_groups, size, ...)`.
    - `rest`: everything else, which all groups share.
    - `num_groups`: the number of groups.
    """

    arrays: PyTree
    rest: PyTree
    num_groups: int = eqx.field(static=True)

    def first(self, count: int) -> "Groups":
        """The first groups, at most `count`."""
        arrays = jax.tree.map(lambda leaf: leaf[:count], self.arrays)
        return Groups(arrays, self.rest, min(count, self.num_groups))

    def whole(self) -> Batch:
        """The batch that was cut."""
        join = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
        return eqx.combine(jax.tree.map(join, self.arrays), self.rest)

    def map(self, fn: Callable[..., Any], *others: Any) -> Any:
        """`fn(rows, *others)` for each group, stacked."""

        def one(arrays, *others):
            return fn(eqx.combine(arrays, self.rest), *others)

        return jax.vmap(one, axis_size=self.num_groups)(self.arrays, *others)


def cut(batch: Batch, size: int | None, name: str) -> Groups:
    """A batch in groups of `size` rows; in one group, if that is `None`.

    **Raises:**

    `ValueError` where that cannot be done; `name` says whose batch it is.
    """
    arrays, rest = eqx.partition(batch, _has_rows)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(arrays)}
    if size is None or not counts:
        num_groups = 1
    elif len(counts) > 1:
        raise ValueError(
            f"The arrays of `{name}` differ in their number of rows "
            f"({', '.join(map(str, sorted(counts)))}), so that they cannot be cut into "
            "examples. Use `examples_per_perturbation=None`, which perturbs `hyper` "
            "once for each batch."
        )
    else:
        (rows,) = counts
        num_groups, left = divmod(rows, size)
        if left:
            raise ValueError(
                f"A batch of `{name}` has {rows} rows, which "
                f"`examples_per_perturbation={size}` does not divide."
            )

    def split(leaf):
        return leaf.reshape(num_groups, leaf.shape[0] // num_groups, *leaf.shape[1:])

    return Groups(jax.tree.map(split, arrays), rest, num_groups)


class PerturbedBatch(eqx.Module):
    """A batch in groups, with a perturbation of `hyper` for each.

    **Attributes:**

    - `groups`: the batch.
    - `coordinates`, `hyper`: the outer variables as a vector.
    - `log_scale`: the logarithm of the scale of the perturbation of each number.
    - `noise`: for each group a perturbation of scale 1.
    - `keys`: for each group one for what is random in a loss.
    """

    groups: Groups
    coordinates: Coordinates
    hyper: Numbers
    log_scale: Numbers
    noise: Float[Array, "num_groups num_hyper"]
    keys: Key

    @property
    def perturbations(self) -> Float[Array, "num_groups num_hyper"]:
        """For each group, how far `hyper` is moved."""
        return jnp.exp(self.log_scale) * self.noise


def perturb(
    groups: Groups, coordinates: Coordinates, hyper: Hyper, log_scale: Numbers, key: Key
) -> PerturbedBatch:
    """A batch with perturbations drawn for it."""
    noise_key, loss_key = jax.random.split(key)
    numbers = coordinates.vector(hyper)
    shape = groups.num_groups, numbers.size
    noise = coordinates.seen(jax.random.normal(noise_key, shape, numbers.dtype))
    keys = jax.random.split(loss_key, groups.num_groups)
    return PerturbedBatch(groups, coordinates, numbers, log_scale, noise, keys)


def mean_state(states: ModelState) -> ModelState:
    """One model state from those of the groups: the means of its floating-point arrays."""

    def mean(leaf):
        if eqx.is_inexact_array(leaf):
            return jnp.mean(leaf, axis=0)
        return leaf[0] if eqx.is_array(leaf) else leaf

    return jax.tree.map(mean, states)


def _has_rows(leaf: Any) -> bool:
    return eqx.is_array(leaf) and leaf.ndim > 0
