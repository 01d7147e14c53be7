"""The batches that one outer step draws from a source."""

from typing import NamedTuple

import equinox as eqx
import jax

from .._core._tree import same_structs
from .._core._types import Batch, IntScalar, Key, PyTree
from .._data import AbstractData, AbstractWrappedData, unwrapped


class Cursors(NamedTuple):
    """The cursors of both losses: the batches that the next outer step draws."""

    train: PyTree
    valid: PyTree


class DrawnBatches(AbstractWrappedData):
    """The batches of one loss in one outer step.

    `batches[index]` gathers one of them; `index` may be traced, so that a loop gathers
    each batch in its step. `len(batches)` is their number. As a source of batches it has
    these draws whatever the key.

    **Attributes:**

    - `source`: the source.
    - `draws`: the draws, stacked on a leading axis.
    - `count`: the number of batches.
    """

    source: AbstractData
    draws: PyTree
    count: int = eqx.field(static=True)

    @property
    def varies(self):
        return self.source.varies

    def init(self, key):
        return None

    def take(self, cursor, num_steps):
        assert num_steps <= self.count  # drawn for the solver that takes them
        return jax.tree.map(lambda leaf: leaf[:num_steps], self.draws), None

    def batch(self, draw):
        return self.source.batch(draw)

    def full(self):
        return self.source.full()

    def __getitem__(self, index: int | IntScalar) -> Batch:
        return self.source.batch(jax.tree.map(lambda leaf: leaf[index], self.draws))

    def __len__(self) -> int:
        return self.count


def first_cursors(train: AbstractData, valid: AbstractData, key: Key) -> Cursors:
    """The cursors before the first outer step, each with a key of its own."""
    train_key, valid_key = jax.random.split(key)
    return Cursors(_as_state(train.init(train_key)), _as_state(valid.init(valid_key)))


def draw(data: AbstractData, cursor: PyTree, count: int) -> tuple[DrawnBatches, PyTree]:
    """The next batches of a source, and the cursor past them.

    The one place where bilevel solvers draw.

    **Raises:**

    `ValueError` where a source returns another kind of cursor than it was given.
    """
    draws, moved = data.take(cursor, count)
    moved = _as_state(moved)
    if not same_structs(cursor, moved):
        name = type(unwrapped(data)).__name__
        raise ValueError(
            f"`{name}.take` must return a cursor of the structure, shapes and dtypes of "
            f"the one that it was given: {eqx.tree_pformat(cursor)}; got "
            f"{eqx.tree_pformat(moved)}."
        )
    return DrawnBatches(data, draws, count), moved


def draw_one(data: AbstractData, key: Key) -> Batch:
    """One batch of a source, for a check before the run."""
    return DrawnBatches(data, data.plan(key, 1), 1)[0]


def check_drawn(data: AbstractData, name: str, num_batches: int) -> None:
    """Raise a `ValueError` where a source does not have as many batches as each outer
    step draws, or has more."""
    data.check(num_batches)
    if data.num_batches is not None and data.num_batches > num_batches:
        raise ValueError(
            f"`{name}` is a `BatchSequence` of {data.num_batches} batches, and "
            f"each outer step would use the same first {num_batches} of them. Use "
            "`metaopt.Minibatches`, or give `metaopt.solve_bilevel` an iterator that "
            f"yields a `BatchSequence` of {num_batches} for each outer step."
        )


def _as_state(cursor: PyTree) -> PyTree:
    """A cursor of arrays without weak types, which a compiled loop carries."""
    return jax.tree.map(_strong, cursor)


def _strong(leaf: PyTree) -> jax.Array:
    leaf = jax.numpy.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype)
