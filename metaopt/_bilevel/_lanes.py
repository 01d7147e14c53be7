"""Outer steps that average over several inner solves, vectorised over them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._results import RESULTS
from .._core._tree import tree_scaled_norm
from .._core._types import PyTree, Vector
from .._data import AbstractData, AbstractFoldedData
from .._report import Report


def num_lanes(num_seeds: int, train: AbstractData, valid: AbstractData) -> int:
    """The number of inner solves in each outer step.

    **Arguments:**

    - `num_seeds`: as in [`metaopt.NestedSolver`][].
    - `train`, `valid`: the sources of both losses.

    **Raises:**

    `ValueError` for folds of one loss alone, and for another number of seeds than of folds.
    """
    counts = {
        name: data.num_folds
        for name, data in (("train", train), ("valid", valid))
        if isinstance(data, AbstractFoldedData)
    }
    if not counts:
        return num_seeds
    if len(counts) == 1 or len(set(counts.values())) > 1:
        given = " and ".join(f"`{name}` has {n} folds" for name, n in counts.items())
        raise ValueError(
            f"{given}: `train` and `valid` must both be `metaopt.Folds`, of equally many."
        )
    if num_seeds != 1:
        raise ValueError(
            f"`num_seeds` is {num_seeds}, and there are {counts['train']} folds, each of "
            "which has a seed of its own already. Leave `num_seeds` out."
        )
    return counts["train"]


def over_lanes(
    fn: Callable[[PyTree, AbstractData, AbstractData], PyTree],
    lanes: PyTree,
    train: AbstractData,
    valid: AbstractData,
) -> PyTree:
    """Apply a function to each lane.

    **Arguments:**

    - `fn`: `fn(lane, train, valid)`.
    - `lanes`: a pytree whose arrays have a leading axis of lanes.
    - `train`, `valid`: sources, the same for all lanes unless they are folds.

    **Returns:**

    A pytree like that of `fn`, whose arrays have a leading axis of lanes.
    """
    stacked = lambda data: data.stacked if isinstance(data, AbstractFoldedData) else None
    folds = [stacked(train), stacked(valid)]

    def one(lane, folds):
        sources = [
            data if fold is None else fold for data, fold in zip((train, valid), folds)
        ]
        return fn(lane, *sources)

    return eqx.filter_vmap(one)(lanes, folds)


def first_lane(tree: PyTree) -> PyTree:
    """The part of the first lane."""
    return jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, tree)


def mean_over_lanes(tree: PyTree) -> PyTree:
    """The mean over lanes of a pytree of floating-point arrays."""
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)


def report_of_lanes(report: Report, gradient: Vector) -> Report:
    """The report on the mean of several hypergradients.

    **Arguments:**

    - `report`: their reports, with a leading axis of lanes.
    - `gradient`: the mean.

    **Returns:**

    A report with the means of the losses, sums of counts, the worst of all that tells of
    accuracy, and the first failure.
    """
    zeros = sum(jnp.sum(leaf == 0) for leaf in jax.tree.leaves(gradient))
    outer, inner = report.outer, report.inner
    failed_step = jnp.max(inner.failed_step)
    inner = jax.tree.map(_mean_or_sum, inner)
    return Report(
        result=first_result(report.result),
        outer=eqx.tree_at(
            lambda o: (o.loss, o.hypergradient_norm, o.num_zeros),
            outer,
            (jnp.mean(outer.loss), tree_scaled_norm(gradient), jnp.asarray(zeros)),
        ),
        inner=eqx.tree_at(lambda i: i.failed_step, inner, failed_step),
        derivative=jax.tree.map(_worst_or_sum, report.derivative),
        adjoint=report.adjoint,
    )


def first_result(result: Any) -> Any:
    """The first failure of several results, an axis of lanes."""
    success: Any = RESULTS.successful
    codes = result._value
    first = codes[jnp.argmax(codes != np.asarray(success._value))]
    return eqx.tree_at(lambda item: item._value, result, first)


def _mean_or_sum(leaf: jax.Array) -> jax.Array:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.mean(leaf, axis=0) if inexact else jnp.sum(leaf, axis=0, dtype=leaf.dtype)


def _worst_or_sum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        return jnp.all(leaf, axis=0)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.sum(leaf, axis=0, dtype=leaf.dtype)
    return jnp.max(leaf, axis=0)
