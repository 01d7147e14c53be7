"""The driver of the outer loop: several steps in one compiled call, callbacks between."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._bilevel import AbstractBilevelSolver, BilevelStep
from .._problem import BilevelProblem
from .._raise import ends_run
from .._report import Best, History, Report
from .._results import RESULTS
from .._tree import tree_size, tree_where_arrays
from .._types import Hyper
from ..callbacks import AbstractCallback
from ._feed import Feed
from ._static import Static


_MAX_RECORDED = 1000  # numbers in `hyper` whose path the history keeps

# Columns that the driver reads and the history does not show.
_FAILED, _UPDATED, _RESULT = "_failed", "_updated", "_result"
_CONVERGED = "_converged"


class Run:
    """A run of the outer loop, as callbacks see it.

    **Attributes:**

    - `num_steps`: the outer steps taken, those before this run included, and one that
        failed under `throw`, which the state does not have.
    - `total`: the outer steps that were asked for.
    - `history`: a [`metaopt.History`][] of the steps of this run.
    - `state`: the state of the bilevel solver. A callback may replace it in `open`.
    - `hyper`: the outer variables.
    - `info`: the [`metaopt.BilevelStep`][] of the last outer step, or `None` before one.
    - `evaluated`: the outer variables that it evaluated the outer loss at.
    - `last`: the rows that the last call added to the history: a dictionary of columns.
    - `best`: a [`metaopt.Best`][], where a callback keeps one.
    - `failed`: whether the last step failed under `throw`, which ends the run.
    - `result`: how the run goes; `metaopt.RESULTS[result]` is its text.
    - `seconds`: the wall time since the run began.
    - `is_first_call`: whether the next steps are yet to be compiled.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: AbstractBilevelSolver,
        feeds: tuple[Feed, Feed],
        state: Any,
        total: int,
    ):
        self.problem = problem
        self.solver = solver
        self.feeds = feeds
        self.total = total
        self.best: Best | None = None
        self.last: dict[str, np.ndarray] = {}
        self.result: Any = RESULTS.successful
        self.failed = False
        self.interrupted = False
        self.num_skipped = 0
        self.is_first_call = True
        self.begun = time.perf_counter()
        self._chunks: list[dict[str, np.ndarray]] = []
        self._path: list[list[np.ndarray]] = []  # arrays of `hyper`, stacked over steps
        self._fixed: dict[bool, tuple[list[Any], Static]] = {}
        self._data: tuple[list[Any], Static] | None = None  # where none is pulled
        self._seen: tuple[list[Any], Static] | None = None
        self.state = state

    @property
    def state(self) -> Any:
        """The state of the bilevel solver."""
        return self._rest.joined(self._arrays)

    @state.setter
    def state(self, state: Any) -> None:
        self._arrays, self._rest = Static.split(state)
        self.num_steps = int(state.num_steps)

    @property
    def hyper(self) -> Hyper:
        """The outer variables."""
        return self.solver.hyper(self.state)

    @property
    def info(self) -> BilevelStep | None:
        """The report on the last outer step, or `None` before one."""
        return None if self._seen is None else self._seen[1].joined(self._seen[0])[0]

    @property
    def evaluated(self) -> Hyper | None:
        """The outer variables that the last outer step evaluated the outer loss at."""
        return None if self._seen is None else self._seen[1].joined(self._seen[0])[1]

    @property
    def seconds(self) -> float:
        """The wall time since the run began."""
        return time.perf_counter() - self.begun

    @property
    def report(self) -> Report | None:
        """The report on the last hypergradient, or `None` before one."""
        return None if self.info is None else self.info.report

    @property
    def num_taken(self) -> int:
        """The outer steps of this run that the history has."""
        return sum(len(chunk["seconds"]) for chunk in self._chunks)

    @property
    def history(self) -> History:
        """One row for each outer step of this run."""
        path = None
        if self._path:
            stacked = [np.concatenate(leaves) for leaves in zip(*self._path)]
            floats, rest = eqx.partition(self.hyper, eqx.is_inexact_array)
            structure = jax.tree.structure(floats)
            path = eqx.combine(jax.tree.unflatten(structure, stacked), rest)
        return History(_joined(self._chunks), path)

    def restore(self, state: Any, columns: dict[str, np.ndarray], path: list) -> None:
        """Goes on from the state and the history of an earlier part of the same run.

        **Arguments:**

        - `state`: the state of the bilevel solver.
        - `columns`: the columns of the history.
        - `path`: the arrays of `history.hyper`; empty where it keeps none.
        """
        self.state = state
        self._chunks = [columns] if len(columns["seconds"]) else []
        self._path = [path] if path else []

    def advance(self, count: int, size: int, atol: float | None, throw: bool) -> bool:
        """Takes up to `count` outer steps in one call of a program for up to `size`.

        **Returns:**

        Whether the run converged or failed in one of them.
        """
        begin = time.perf_counter()
        seen = self._call(count, size, atol, throw, exact=False)
        if "tolerance" in seen.columns and seen.converged:
            # A zero of a rough hypergradient is not one of the hypergradient.
            self._record(seen.without_last(), begin)
            begin = time.perf_counter()
            seen = self._call(1, 1, atol, throw, exact=True)
        self._record(seen, begin)
        self.failed = seen.failed and throw
        return self.failed or seen.converged

    def _call(
        self, count: int, size: int, atol: float | None, throw: bool, exact: bool
    ) -> "_Seen":
        if exact not in self._fixed:
            solver = self.solver.exact if exact else self.solver
            self._fixed[exact] = Static.split((solver, self.problem))
        fixed, rest = self._fixed[exact]
        data, data_rest = self._taken(count, size)
        pulled = tuple(feed.is_pulled for feed in self.feeds)
        program = _Program(rest, self._rest, data_rest, pulled, size, throw, exact)
        # Arrays, so that no number of steps and no tolerance is compiled anew.
        limits = np.asarray(count), np.asarray(-1.0 if atol is None else atol)
        out = _advance(program, fixed, self._arrays, data, *limits)
        arrays, rows, info, taken, traced = out
        # Waits for the device here, so that an interrupt finds finished steps.
        rows, taken = jax.device_get((rows, taken))
        self._arrays, self._seen = arrays, (info, traced.info)
        self.is_first_call = False
        return _Seen.of(traced, rows, int(taken))

    def _taken(self, count: int, size: int) -> tuple[list[Any], Static]:
        """The data of the next steps."""
        if self._data is not None:
            return self._data
        split = Static.split(tuple(feed.take(count, size) for feed in self.feeds))
        if not any(feed.is_pulled for feed in self.feeds):
            self._data = split
        return split

    def _record(self, seen: "_Seen", begin: float) -> None:
        if not seen.num_steps:
            return
        each = (time.perf_counter() - begin) / seen.num_steps
        columns = dict(seen.columns)
        failed, updated = columns.pop(_FAILED), columns.pop(_UPDATED)
        codes = columns.pop(_RESULT)
        del columns[_CONVERGED]
        columns["seconds"] = np.full(seen.num_steps, each)
        self.num_steps += seen.num_steps
        for feed in self.feeds:
            feed.use(seen.num_steps)
        self._chunks.append(columns)
        self.last = columns
        if seen.path:
            self._path.append(seen.path)
        self.num_skipped += int(np.sum((failed > 0) & (updated == 0)))
        if np.any(failed) and not _is_failure(self.result):
            code = np.asarray(codes[np.argmax(failed > 0)], np.int32)
            success: Any = RESULTS.successful
            self.result = eqx.tree_at(lambda item: item._value, success, code)


def drive(
    run: Run,
    *,
    steps_per_call: int,
    atol: float | None,
    callbacks: Sequence[AbstractCallback],
    throw: bool,
) -> None:
    """Takes outer steps until done, stopped, failed (under `throw`) or converged."""
    ended = False
    # Each that was opened is closed, even where another fails.
    with contextlib.ExitStack() as opened:
        try:
            for callback in callbacks:
                callback.open(run)
                opened.callback(callback.close, run)
            while run.num_steps < run.total and not ended:
                count = min(steps_per_call, run.total - run.num_steps)
                for feed in run.feeds:
                    count = feed.pull(count)
                if not count:
                    if not _is_failure(run.result):
                        run.result = RESULTS.outer_data_exhausted
                    break
                ended = run.advance(count, steps_per_call, atol, throw)
                # Each of them sees every step, whichever ends the run.
                answers = [ends_run(callback.see, run) for callback in callbacks]
                ended = ended or any(answers)
        except KeyboardInterrupt:
            run.interrupted = True
            if not _is_failure(run.result):
                run.result = RESULTS.interrupted
    if atol is not None and not ended and not _is_failure(run.result):
        run.result = RESULTS.outer_max_steps


class _Program(NamedTuple):
    """The static part of a compiled call.

    `pulled` tells for each loss whether every step has data of its own, `size` is the
    largest number of steps, `throw` says that a step that fails is the last.
    """

    fixed: Static
    state: Static
    data: Static
    pulled: tuple[bool, ...]
    size: int
    throw: bool
    exact: bool


class _Traced(NamedTuple):
    """The static part of what a compiled call returns."""

    floats: tuple[str, ...]
    ints: tuple[str, ...]
    info: Static


@eqx.filter_jit
def _advance(
    program: _Program,
    fixed: list[Any],
    arrays: list[Any],
    data: list[Any],
    count: Any,
    limit: Any,
) -> Any:
    """Up to `count` outer steps; fewer where one converges, or fails under `throw`."""
    solver, problem = program.fixed.joined(fixed)
    sources = program.data.joined(data)
    static: list[Any] = []

    def step(arrays, index):
        own = [
            jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, source)
            if pulled
            else source
            for source, pulled in zip(sources, program.pulled)
        ]
        state = program.state.joined(arrays)
        new, info = solver.step(problem, state, *own)
        columns = info.report.scalars()
        failed = info.report.result != RESULTS.successful
        converged = columns["hypergradient_norm"].astype(float) <= limit
        # A step that fails under `throw`, or has to be taken again, is not kept.
        undone = failed if program.throw else jnp.zeros((), bool)
        if "tolerance" in columns:
            undone = undone | converged
        new = tree_where_arrays(jnp.logical_not(undone), new, state)
        columns[_FAILED] = failed.astype(int)
        columns[_UPDATED] = info.updated.astype(int)
        columns[_RESULT] = info.report.result._value
        columns[_CONVERGED] = converged.astype(int)
        floats, ints = _by_kind(columns)
        hyper = eqx.filter(solver.hyper(new), eqx.is_inexact_array)
        path = jax.tree.leaves(hyper) if tree_size(hyper) <= _MAX_RECORDED else []
        ends = converged | failed if program.throw else converged
        info_arrays, info_rest = Static.split((info, solver.hyper(state)))
        static[:] = [tuple(floats), tuple(ints), info_rest]
        rows = _stack(floats), _stack(ints), path
        new_arrays, _ = Static.split(new)
        return new_arrays, rows, info_arrays, ends

    first = jnp.zeros((), int)
    # Traced once: its shapes are known before the loop that repeats it.
    closed: Any = eqx.filter_closure_convert(step, arrays, first)
    _, rows, info, _ = jax.tree.map(
        lambda struct: jnp.zeros(struct.shape, struct.dtype), closed.out_struct
    )
    rows = jax.tree.map(lambda a: jnp.zeros((program.size, *a.shape), a.dtype), rows)

    def go_on(carry):
        index, ends, *_ = carry
        return (index < count) & jnp.logical_not(ends)

    def body(carry):
        index, _, arrays, rows, _ = carry
        arrays, row, info, ends = closed(arrays, index)
        rows = jax.tree.map(lambda all, one: all.at[index].set(one), rows, row)
        return index + 1, ends, arrays, rows, info

    start = first, jnp.zeros((), bool), arrays, rows, info
    taken, _, arrays, rows, info = jax.lax.while_loop(go_on, body, start)
    return arrays, rows, info, taken, _Traced(*static)


def _by_kind(columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of floats and those of ints, each in the widest dtype there is."""
    floats, ints = {}, {}
    for name, x in columns.items():
        is_float = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        (floats if is_float else ints)[name] = x.astype(float if is_float else int)
    return floats, ints


def _stack(columns: dict[str, Any]) -> Any:
    # One array for all of them, so that the host reads it at once.
    return jnp.stack(list(columns.values()))


class _Seen(NamedTuple):
    """The steps of one call, on the host."""

    columns: dict[str, np.ndarray]
    path: list[np.ndarray]
    num_steps: int
    converged: bool
    failed: bool

    @classmethod
    def of(cls, traced: _Traced, rows: Any, num_steps: int) -> "_Seen":
        floats, ints, path = jax.tree.map(lambda a: a[:num_steps], rows)
        columns = dict(zip(traced.floats, floats.T)) | dict(zip(traced.ints, ints.T))
        return cls(
            columns,
            path,
            num_steps,
            converged=bool(columns[_CONVERGED][-1]),
            failed=bool(columns[_FAILED][-1]),
        )

    def without_last(self) -> "_Seen":
        """The same without the last step."""
        columns, path = jax.tree.map(lambda a: a[:-1], (self.columns, self.path))
        return _Seen(columns, path, self.num_steps - 1, self.converged, self.failed)


def _joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The columns of a history; a step that lacks one has NaN there."""
    if not chunks:
        empty = np.zeros(0)
        return {"outer_loss": empty, "hypergradient_norm": empty, "seconds": empty}
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    nans = lambda chunk: np.full(len(chunk["seconds"]), np.nan)
    return {
        name: np.concatenate(
            [chunk[name] if name in chunk else nans(chunk) for chunk in chunks]
        )
        for name in names
    }


def _is_failure(result: Any) -> bool:
    return bool(result != RESULTS.successful)
