"""Sources of batches."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._core._foreign import batch_on_host
from .._core._shuffle import permuted
from .._core._tree import leaf_names
from .._core._types import IntScalar, Key
from .._core._validate import check_count
from ._base import AbstractData, AbstractFoldedData


class FullBatch(AbstractData):
    """All of the data at every step. Plain arrays become one of these.

    **Arguments:**

    - `arrays`: any pytree of arrays, handed to the losses as it is (or `None`).
    """

    arrays: PyTree[Any]

    @property
    def varies(self):
        return False

    @property
    def num_batches(self):
        return None

    def check(self, num_steps):
        _check_arrays(self.arrays, "the data of `FullBatch`")

    def init(self, key):
        return None

    def take(self, cursor, num_steps):
        return None, None

    def batch(self, draw):
        return self.arrays

    def full(self):
        return self.arrays


class _Position(eqx.Module):
    """The cursor of minibatches: the next row to be drawn."""

    key: Key  # folded with the number of an epoch, the key of its order
    epoch: IntScalar
    position: IntScalar  # the rows of the epoch that have been drawn


class Minibatches(AbstractData):
    """Random minibatches, drawn inside the compiled loop.

    The rows are shuffled anew in every epoch, and each epoch draws each row once. A batch
    at the end of an epoch that lacks rows has the first ones of the next. In a run of
    [`metaopt.solve_bilevel`][] epochs continue from one outer step to the next, separately
    for the inner and the outer loss; a source that an iterator yields for one outer step
    begins an epoch. The cost of a draw does not depend on how many other rows there are.
    Under an implicit adjoint the loop draws minibatches while the optimality is taken on
    all the rows.

    **Arguments:**

    - `arrays`: a pytree of arrays that share their leading axis, one row per example.
    - `batch_size`: the number of rows in a batch.

    **Raises:**

    `ValueError` where the leading axes differ, or `batch_size` does not fit.
    """

    arrays: PyTree[Any]
    batch_size: int = eqx.field(static=True)

    @property
    def varies(self):
        return True

    @property
    def num_batches(self):
        return None

    def check(self, num_steps):
        _check_arrays(self.arrays, "the data of `Minibatches`")
        rows = _num_rows(self.arrays, "Minibatches")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise ValueError(f"`batch_size` must be an int; got {self.batch_size!r}.")
        if not 1 <= self.batch_size <= rows:
            raise ValueError(
                f"`batch_size` must lie between 1 and the number of rows, {rows}; got "
                f"{self.batch_size}."
            )

    def init(self, key):
        return _Position(key, jnp.zeros((), int), jnp.zeros((), int))

    def take(self, cursor, num_steps):
        rows = _num_rows(self.arrays, "Minibatches")
        count = num_steps * self.batch_size
        # Both lie within an epoch, also for a cursor that comes from more rows than these.
        epoch = cursor.epoch + cursor.position // rows
        begin = cursor.position % rows
        places = begin + jnp.arange(count)
        most = (rows + count - 2) // rows + 1  # epochs that `count` rows can be parts of
        fold_in = lambda index: jax.random.fold_in(cursor.key, epoch + index)
        keys = jax.vmap(fold_in)(jnp.arange(most))
        draws = permuted(keys, places // rows, places % rows, rows)
        end = begin + count
        cursor = _Position(cursor.key, epoch + end // rows, end % rows)
        return draws.reshape(num_steps, self.batch_size), cursor

    def batch(self, draw):
        return jax.tree.map(lambda a: _rows_of(jnp.asarray(a), draw), self.arrays)

    def full(self):
        return self.arrays


class BatchSequence(AbstractData):
    """Batches that were made beforehand, one for each step of the inner solver.

    **Arguments:**

    - `arrays`: a pytree of arrays whose leading axis counts the steps, such as batches
        pulled from any iterator and stacked with `numpy.stack`.

    **Raises:**

    `ValueError` where the leading axes differ or there are fewer batches than steps.
    """

    arrays: PyTree[Any]

    @property
    def num_batches(self) -> int:
        """The number of batches."""
        return _num_rows(self.arrays, "BatchSequence")

    @property
    def varies(self):
        return True

    def check(self, num_steps):
        _check_arrays(self.arrays, "the data of `BatchSequence`")
        rows = self.num_batches
        if rows < num_steps:
            raise ValueError(
                f"`BatchSequence` holds {rows} batches but the inner solver takes "
                f"{num_steps} steps. Give at least one batch for each step."
            )

    def init(self, key):
        return None

    def take(self, cursor, num_steps):
        return jnp.arange(num_steps), None

    def batch(self, draw):
        return jax.tree.map(lambda a: _rows_of(a, draw), self.arrays)

    def full(self):
        raise ValueError(
            "This needs all of the data as one batch, which a `BatchSequence` does not "
            "have. Use `metaopt.Minibatches` or plain arrays for the inner data, or an "
            "adjoint that follows the path, such as `metaopt.UnrolledAdjoint`."
        )


class InnerBatches:
    """Batches of a loader, one for each step of the inner solver.

    [`metaopt.solve_bilevel`][] pulls one item for each *outer* step from an iterable. In
    this one an item is a [`metaopt.BatchSequence`][] of `num_steps` batches, so that each
    *inner* step sees a batch of its own. A loader that can be started anew is, whenever it
    is exhausted; left-over batches of an iterator are not used.

    **Arguments:**

    - `batches`: an iterable of batches of equal shapes: a loader, or a generator.
    - `num_steps`: the number of steps of the inner solver.

    **Raises:**

    `ValueError` unless `num_steps` is a positive int, and where batches differ in their
    shapes.
    """

    def __init__(self, batches: Iterable[Any], num_steps: int):
        check_count(num_steps, "num_steps")
        self.batches = batches
        self.num_steps = num_steps

    def __iter__(self) -> Iterator[BatchSequence]:
        source = iter(restarted(self.batches))
        while rows := list(itertools.islice(source, self.num_steps)):
            if len(rows) < self.num_steps:
                return
            rows = [batch_on_host(row, "batches") for row in rows]
            _check_alike(rows)
            yield BatchSequence(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


def _check_alike(batches: Sequence[PyTree[Any]]) -> None:
    """Raise a `ValueError` where batches differ in structure or shapes."""
    kinds = [jax.tree.map(np.shape, batch) for batch in batches]
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                "`InnerBatches` needs batches of equal shapes, because one compiled "
                f"program takes them all: the first has the shapes {kinds[0]}, and number "
                f"{index + 1} of the same outer step {kind}. Leave the short last batch "
                "out (`drop_last=True` for a PyTorch `DataLoader`)."
            )


def restarted(batches: Iterable[Any]) -> Iterator[Any]:
    """The items of an iterable, over and over if it can be started anew."""
    once = isinstance(batches, Iterator)
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if once or empty:
            return


def as_data(data: Any, name: str) -> AbstractData:
    """`data` as a source of batches: plain arrays become a [`metaopt.FullBatch`][].

    **Raises:**

    `ValueError` where plain arrays differ in the length of their leading axis: examples
    and labels that do not belong together can broadcast without a word.
    """
    if isinstance(data, AbstractData):
        return data
    if data is None:
        return _NOTHING
    names, leaves = leaf_names(data, name), jax.tree.leaves(data)
    counts = {
        name: leaf.shape[0]
        for name, leaf in zip(names, leaves)
        if eqx.is_array(leaf) and leaf.ndim > 0
    }
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{_listed(counts)}: arrays that differ in their number of rows. If that is "
            "meant, say so with `metaopt.FullBatch(data)`. If it is a list of batches, "
            "they must be of the same shapes: leave out the last one, and hand over "
            "`iter(batches)` to `metaopt.solve_bilevel`."
        )
    return FullBatch(data)


_NOTHING = FullBatch(None)


def _check_arrays(arrays: PyTree[Any], whose: str) -> None:
    """Raise a `ValueError` for a source of batches among the arrays, and where every array
    is empty. Beside others one may be."""
    is_source = lambda node: isinstance(node, AbstractData)
    for node in jax.tree.leaves(arrays, is_leaf=is_source):
        if is_source(node):
            text = f"{whose} are a source of batches, of class `{type(node).__name__}`."
            if isinstance(node, AbstractFoldedData):
                raise ValueError(
                    f"{text} Write folds of minibatches instead: `metaopt.Folds("
                    "[metaopt.Minibatches(fold, 32) for fold in folds])`."
                )
            raise ValueError(f"{text} Hand over its arrays.")
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if eqx.is_array(leaf)]
    if leaves and all(leaf.size == 0 for leaf in leaves):
        shape = leaves[0].shape
        raise ValueError(f"{whose} holds an empty array, of shape {shape}.")


def _rows_of(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array[index]`, over an explicit mesh too, where JAX asks how it is to be sharded:
    the rows as before if they divide evenly, and everything else as before."""
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.explicit_axes:
        return array[index]
    over, *others = sharding.spec
    axes = over if isinstance(over, tuple) else () if over is None else (over,)
    num_shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
    rows = [over if size % num_shards == 0 else None for size in index.shape]
    spec = jax.sharding.PartitionSpec(*rows, *others)
    return array.at[index].get(out_sharding=jax.NamedSharding(sharding.mesh, spec))


def _num_rows(arrays: PyTree[Any], owner: str) -> int:
    leaves = jax.tree.leaves(arrays)
    if not leaves:
        raise ValueError(f"`{owner}` needs at least one array; got {arrays!r}.")
    names = leaf_names(arrays, "arrays")
    for name, leaf in zip(names, leaves):
        if not eqx.is_array(leaf) or leaf.ndim == 0:
            raise ValueError(
                f"`{owner}` needs arrays with a leading axis; `{name}` is {leaf!r}."
            )
    counts = {name: leaf.shape[0] for name, leaf in zip(names, leaves)}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"The arrays of `{owner}` must share the length of their leading axis; got "
            f"{_listed(counts)}."
        )
    return next(iter(counts.values()))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} rows in `{name}`" for name, count in counts.items())
