"""The compiled call of a driver: several outer steps without a word to Python."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._compiled import jitted
from .._core._results import RESULTS
from .._core._static import Static
from .._core._tree import tree_size, tree_where_arrays
from .._core._types import Hyper
from .._report import Best
from ._row import Cell, Row, Shown


_MAX_RECORDED = 1000  # numbers in `hyper` whose path the history keeps


class Program(NamedTuple):
    """The static part of a compiled call.

    `body`, `state` and `data` are pytrees without their arrays; `pulled` tells for each
    source whether every step has data of its own; `size` is the largest number of steps;
    `throw` says that a step that fails is the last; `keeps_best` that the step of the
    lowest outer loss is kept.
    """

    body: Static
    state: Static
    data: Static
    pulled: tuple[bool, ...]
    size: int
    throw: bool
    keeps_best: bool


class Marks(NamedTuple):
    """The part of a step's record that the driver reads: ints, one for each step."""

    failed: Any
    updated: Any
    converged: Any
    result: Any  # codes of `RESULTS`
    reason: Any


class Steps(NamedTuple):
    """The steps of one call, on the host: one row for each.

    **Attributes:**

    - `columns`: the columns of the history.
    - `marks`: the [`metaopt._outer.Marks`][].
    - `path`: the arrays of `hyper` after each step; empty where they are not kept.
    - `is_rough`: whether a hypergradient of zero may be none.
    - `best`: the [`metaopt.extend.Best`][] of these steps, counted from 0; `None` where
        none updated `hyper` at a finite outer loss, and where it is not kept.
    """

    columns: dict[str, np.ndarray]
    marks: Marks
    path: list[np.ndarray]
    is_rough: bool
    best: Best | None

    @property
    def num_steps(self) -> int:
        """The number of steps taken."""
        return len(self.marks.failed)

    @property
    def converged(self) -> bool:
        """Whether the last step did."""
        return bool(self.marks.converged[-1])

    @property
    def failed(self) -> bool:
        """Whether the last step did."""
        return bool(self.marks.failed[-1])

    def without_last(self) -> "Steps":
        """The same without the last step."""
        rows = self.columns, self.marks, self.path
        columns, marks, path = jax.tree.map(lambda a: a[:-1], rows)
        return self._replace(columns=columns, marks=marks, path=path)


class _Known(NamedTuple):
    """The part of the output of a compiled call that is known once it is traced.

    The cells tell where a row has the numbers of a step. `moves` tells of each array of the
    state whether a step changes it.
    """

    taken: Cell
    marks: tuple[Cell, ...]
    columns: tuple[tuple[str, Cell], ...]
    shown: Shown
    moves: tuple[bool, ...]
    is_rough: bool
    kept: Static


def advance(
    program: Program,
    body: list[Any],
    state: list[Any],
    data: list[Any],
    count: jax.Array,
    limit: jax.Array,
) -> tuple[list[Any], Callable[[], tuple[Any, Hyper]], Steps]:
    """Take up to `count` outer steps in one call of a program for up to `program.size`;
    fewer where one converges, or fails under `throw`.

    **Arguments:**

    - `program`: the static part.
    - `body`, `state`, `data`: the arrays of the three pytrees in it.
    - `count`: the number of steps. An array, so that no number is compiled anew.
    - `limit`: the norm of a hypergradient that is taken for zero; negative for none.

    **Returns:**

    The arrays of the new state; a function that returns the report on the last step and
    the outer variables before it; and the steps.
    """
    out = _take_steps(program, body, state, data, count, limit)
    moved, rows, path, others, best, static = out
    known: _Known = static.tree
    rows = np.asarray(rows)
    rows = rows[: np.count_nonzero(known.taken.read(rows))]
    steps = Steps(
        columns={name: cell.read(rows) for name, cell in known.columns},
        marks=Marks(*(cell.read(rows) for cell in known.marks)),
        path=[np.asarray(leaf)[: len(rows)] for leaf in path],
        is_rough=known.is_rough,
        best=_best(best, known.kept) if program.keeps_best else None,
    )
    show = lambda: known.shown.joined(others, rows[-1])
    return _merged(known.moves, moved, state), show, steps


@jitted
def _take_steps(
    program: Program,
    body: list[Any],
    state: list[Any],
    data: list[Any],
    count: Any,
    limit: Any,
) -> Any:
    known: list[_Known] = []
    step = functools.partial(_step, program, body, data, limit, known)
    first = jnp.zeros((), int)
    # Traced once: its shapes are known before the loop that repeats it.
    closed: Any = eqx.filter_closure_convert(step, state, first)
    moves = known[0].moves
    _, row, path, others, best, _ = jax.tree.map(
        lambda struct: jnp.zeros(struct.shape, struct.dtype), closed.out_struct
    )
    if program.keeps_best:
        best = jnp.full_like(best[0], jnp.inf), *best[1:]
    room = lambda a: jnp.zeros((program.size, *a.shape), a.dtype)
    rows = jax.tree.map(room, (row, path))

    def go_on(carry):
        index, ends, *_ = carry
        return (index < count) & jnp.logical_not(ends)

    def take(carry):
        index, _, moved, rows, _, best = carry
        moved, *row, others, new, ends = closed(_merged(moves, moved, state), index)
        put = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, index, 0)
        rows = jax.tree.map(put, rows, tuple(row))
        if program.keeps_best:
            best = tree_where_arrays(new[0] < best[0], new, best)
        return index + 1, ends, moved, rows, others, best

    moved = [leaf for moves, leaf in zip(moves, state) if moves]
    start = first, jnp.zeros((), bool), moved, rows, others, best
    _, _, moved, rows, others, best = jax.lax.while_loop(go_on, take, start)
    return moved, *rows, others, best, Static(known[0])


def _best(best: tuple[Any, ...], kept: Static) -> Best | None:
    loss, index, arrays = best
    hyper, params = kept.joined(arrays)
    loss = float(loss)
    return Best(hyper, params, loss, int(index)) if loss < float("inf") else None


def _merged(moves: tuple[bool, ...], moved: list[Any], state: list[Any]) -> list[Any]:
    """The arrays of a state, of which those that move are new."""
    new = iter(moved)
    return [next(new) if moves else old for moves, old in zip(moves, state)]


def _step(
    program: Program,
    body: list[Any],
    data: list[Any],
    limit: Any,
    known: list[_Known],
    state: list[Any],
    index: Any,
) -> Any:
    """One step, on arrays alone; the rest of its output goes to `known`."""
    driven = program.body.joined(body)
    sources = [
        jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, source)
        if pulled
        else source
        for source, pulled in zip(program.data.joined(data), program.pulled)
    ]
    old = program.state.joined(state)
    new, record = driven.step(old, *sources)
    failed = record.result != RESULTS.successful
    converged = record.columns["hypergradient_norm"].astype(float) <= limit
    if "change" in record.columns:  # of a solver without inner solve
        converged &= record.columns["change"].astype(float) <= limit
    ends = converged | failed if program.throw else converged
    # A step that fails under `throw`, or has to be taken again, is not kept.
    undone = failed if program.throw else jnp.zeros((), bool)
    if record.is_rough:
        undone = undone | converged
    reached = Static.split(new)[0]
    moves = tuple(leaf is not before for leaf, before in zip(reached, state, strict=True))
    moved = [
        jnp.where(undone, before, leaf)
        for leaf, before, moves in zip(reached, state, moves)
        if moves
    ]
    hyper = eqx.filter(
        driven.hyper(program.state.joined(_merged(moves, moved, state))),
        eqx.is_inexact_array,
    )
    path = jax.tree.leaves(hyper) if tree_size(hyper) <= _MAX_RECORDED else []
    codes = record.result._value, record.reason._value
    row = Row()
    taken = row.put(True)
    marks = [row.put(x) for x in (failed, record.updated, converged, *codes)]
    columns = [(name, row.put(x)) for name, x in record.columns.items()]
    others, shown = Shown.split((record.info, driven.hyper(old)), row)
    best, kept = (), Static(None)
    if program.keeps_best:
        arrays, kept = Static.split((driven.hyper(old), driven.solution(new)))
        counts = record.updated & jnp.logical_not(undone)
        loss = record.columns["outer_loss"].astype(float)
        best = jnp.where(counts, loss, jnp.inf), index, arrays
    static = tuple(marks), tuple(columns), shown, moves, record.is_rough, kept
    known.append(_Known(taken, *static))
    return moved, row.bits(), path, others, best, ends
