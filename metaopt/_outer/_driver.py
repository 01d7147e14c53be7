"""The driver of the outer loop: several steps in one compiled call, callbacks between."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._description import description
from .._core._results import RESULTS
from .._core._static import Static
from .._core._types import Hyper
from .._report import attach_solution, Best, ends_run, History, INTERRUPT
from ..callbacks import AbstractCallback
from ._body import AbstractBody
from ._columns import joined
from ._feed import AbstractFeed
from ._function import name_of
from ._interrupts import Interrupts
from ._program import advance, Program, Steps


class Run:
    """A run of the outer loop, as callbacks see it.

    **Attributes:**

    - `num_steps`: the outer steps taken, those before this run included, and one that
        failed under `throw`, which the state does not have.
    - `total`: the outer steps that were asked for.
    - `history`: a [`metaopt.History`][] of the steps of this run.
    - `state`: the state of the bilevel solver, or a [`metaopt.few_shot.TrainState`][]. A
        callback may replace it in `open`.
    - `hyper`: the outer variables; what is learned over tasks.
    - `params`: the inner solution of the last outer step; `None` of learning over tasks.
    - `info`: the report on the last outer step, or `None` before one: a
        [`metaopt.extend.BilevelStep`][] or a [`metaopt.few_shot.TaskStats`][].
    - `updated`: whether it updated the outer variables.
    - `evaluated`: the outer variables that it evaluated the outer loss at.
    - `last`: the rows that the last call added to the history: a dictionary of columns.
    - `best`: a [`metaopt.extend.Best`][], where `keeps_best`; else `None`.
    - `keeps_best`: whether the step of the lowest outer loss is kept. A callback may set it
        in `open`.
    - `ended_by`: the end of the run, in words; empty before it.
    - `failed`: whether the last step failed under `throw`, which ends the run.
    - `result`: how the run goes; `metaopt.RESULTS[result]` is its text.
    - `reason`: the first failure within a step that itself did not fail, or that failure.
    - `num_skipped`: the steps that failed and left the outer variables alone.
    - `first_failed`: the first step of the last call that failed, from 0; `None` if none.
    - `undo`: what [`metaopt.callbacks.RollBack`][] may go back to; in checkpoints, too.
    - `going_back`: what becomes of `undo` where the run goes back to its `start` next,
        which a callback may set in `see`.
    - `num_failed`: the steps that failed since the run was started.
    - `seconds`: the wall time since the run began.
    - `settings`: the settings of problem and solver, `hyper` and the data as they are:
        texts by their names, the same in another process.
    """

    def __init__(
        self, body: AbstractBody, feeds: Sequence[AbstractFeed], state: Any, total: int
    ):
        self.body = body
        self.feeds = feeds
        self.total = total
        self._bests: list[Best] = []  # each lower than those before
        self.keeps_best = False
        self.last: dict[str, np.ndarray] = {}
        self.result: Any = RESULTS.successful
        self.reason: Any = RESULTS.successful
        self.failed = False
        self.interrupted = False
        self.interrupts = Interrupts()
        self.ended_by = ""
        self.num_skipped = 0
        self.num_failed = 0
        self.first_failed: int | None = None
        self.undo: Any = None
        self.going_back: Any = None
        self._sound: tuple[Any, Any, int, int] | None = None  # before the last call
        self.updated = False
        self.begun = time.perf_counter()
        self._chunks: list[dict[str, np.ndarray]] = []
        self._path: list[list[np.ndarray]] = []  # arrays of `hyper`, stacked over steps
        self._bodies: dict[bool, tuple[list[Any], Static]] = {}
        self._data: tuple[list[Any], Static] | None = None  # where none is pulled
        self._numbers: dict[tuple[type, float], jax.Array] = {}
        self._shown: Callable[[], tuple[Any, Hyper]] | None = None
        self.state = state

    @property
    def state(self) -> Any:
        """The state that one outer step hands to the next."""
        return self._rest.joined(self._arrays)

    @state.setter
    def state(self, state: Any) -> None:
        self._arrays, self._rest = Static.split(state)
        self.num_steps = int(state.num_steps)

    @property
    def hyper(self) -> Hyper:
        """The outer variables."""
        return self.body.hyper(self.state)

    @property
    def params(self) -> Any:
        """The inner solution of the last outer step, or `None`."""
        return self.body.solution(self.state)

    @property
    def best(self) -> Best | None:
        """The step of the lowest outer loss, or `None`."""
        return self._bests[-1] if self._bests else None

    @best.setter
    def best(self, best: Best | None) -> None:
        self._bests = [] if best is None else [best]

    @property
    def info(self) -> Any:
        """The report on the last outer step, or `None` before one."""
        return None if self._shown is None else self._shown()[0]

    @property
    def evaluated(self) -> Hyper | None:
        """The outer variables that the last outer step evaluated the outer loss at."""
        return None if self._shown is None else self._shown()[1]

    @property
    def settings(self) -> dict[str, str]:
        """The settings of problem and solver, and the data, by their names."""
        rows = description(self.body, "") | description(self.hyper, "hyper")
        for feed, name in zip(self.feeds, ("train", "valid")):
            if not feed.is_pulled:
                rows |= description(feed.now, name)
        return {name.removeprefix("."): value for name, value in rows.items() if name}

    @property
    def seconds(self) -> float:
        """The wall time since the run began."""
        return time.perf_counter() - self.begun

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
        return History(joined(self._chunks), path)

    def restore(self, state: Any, columns: dict[str, np.ndarray], path: list) -> None:
        """Go on from the state and the history of an earlier part of the same run.

        **Arguments:**

        - `state`: the state of the bilevel solver.
        - `columns`: the columns of the history.
        - `path`: the arrays of `history.hyper`; empty where it keeps none.
        """
        self.state = state
        self._chunks = [columns] if len(columns["seconds"]) else []
        self._path = [path] if path else []

    def go_back(self) -> None:
        """Go back to `going_back`, as if the steps since then had not been taken."""
        self.undo, self.going_back = self.going_back, None
        state = self.undo.start
        kept = self.num_taken - (self.num_steps - int(state.num_steps))
        columns = {name: column[:kept] for name, column in joined(self._chunks).items()}
        path = [np.concatenate(leaves)[:kept] for leaves in zip(*self._path)]
        self.restore(state, columns, path)
        self._bests = [best for best in self._bests if best.step < self.num_steps]
        assert self._sound is not None
        self.result, self.reason, self.num_skipped, self.num_failed = self._sound
        self.failed, self.first_failed, self.ended_by = False, None, ""
        for feed in self.feeds:
            feed.rewind(self.num_steps)

    def advance(self, count: int, size: int, atol: float | None, throw: bool) -> bool:
        """Take up to `count` outer steps in one call of a program for up to `size`.

        **Returns:**

        Whether the run converged or failed in one of them.
        """
        steps = self._call(count, size, atol, throw, exact=False)
        if steps.is_rough and steps.converged:
            # A zero of a rough hypergradient is not one of the hypergradient.
            steps = self._call(1, 1, atol, throw, exact=True)
        return self.failed or steps.converged

    def has_converged(self, atol: float | None) -> bool:
        """Whether a run that goes on from a file had converged there."""
        if atol is None or not self.num_taken:
            return False
        last = self._chunks[-1]
        # A small rough hypergradient is checked by an exact step, whose tolerance is NaN.
        if "tolerance" in last and np.isfinite(last["tolerance"][-1]):
            return False
        # The second of a solver without inner solve.
        names = [name for name in ("hypergradient_norm", "change") if name in last]
        return all(bool(last[name][-1] <= atol) for name in names)

    def _call(
        self, count: int, size: int, atol: float | None, throw: bool, exact: bool
    ) -> Steps:
        if exact not in self._bodies:
            driven = self.body.exact(self.info) if exact else self.body
            self._bodies[exact] = Static.split(driven)
        body, rest = self._bodies[exact]
        data, data_rest = self._taken(count, size)
        pulled = tuple(feed.is_pulled for feed in self.feeds)
        program = Program(rest, self._rest, data_rest, pulled, size, throw, self.keeps_best)
        limit = -1.0 if atol is None else atol
        numbers = self._on_device(count), self._on_device(limit)
        begin = time.perf_counter()
        out = advance(program, body, self._arrays, data, *numbers)
        with self.interrupts.held_back():
            self._arrays, self._shown, steps = out
            # The last step is taken again, to full accuracy.
            again = steps.is_rough and steps.converged
            self._record(steps.without_last() if again else steps, begin)
            self.failed = steps.failed and throw
        return steps

    def _on_device(self, number: float) -> jax.Array:
        # To put it there takes longer than a small step.
        place = type(number), number
        if place not in self._numbers:
            self._numbers[place] = jnp.asarray(number)
        return self._numbers[place]

    def _taken(self, count: int, size: int) -> tuple[list[Any], Static]:
        """The data of the next steps."""
        if self._data is not None:
            return self._data
        split = Static.split(tuple(feed.take(count, size) for feed in self.feeds))
        if not any(feed.is_pulled for feed in self.feeds):
            self._data = split
        return split

    def _record(self, steps: Steps, begin: float) -> None:
        count = steps.num_steps
        if not count:
            return
        self._sound = self.result, self.reason, self.num_skipped, self.num_failed
        each = (time.perf_counter() - begin) / count
        self.last = steps.columns | {"seconds": np.full(count, each)}
        self._chunks.append(self.last)
        if steps.path:
            self._path.append(steps.path)
        best = steps.best
        if best and (self.best is None or best.outer_loss < self.best.outer_loss):
            best = dataclasses.replace(best, step=self.num_steps + best.step)
            # A run goes back by two calls at most, each of which has found one at most.
            self._bests = [*self._bests[-2:], best]
        self.num_steps += count
        for feed in self.feeds:
            feed.use(count)
        marks = steps.marks
        self.updated = bool(marks.updated[-1])
        failed = np.flatnonzero(marks.failed)
        self.first_failed = int(failed[0]) if failed.size else None
        if np.any(marks.failed):
            self.num_failed += int(np.sum(marks.failed > 0))
            self.num_skipped += int(np.sum((marks.failed > 0) & (marks.updated == 0)))
            self.result = _first(self.result, marks.result)
        self.reason = _first(self.reason, marks.reason)


def drive(
    run: Run,
    *,
    steps_per_call: int,
    atol: float | None,
    callbacks: Sequence[AbstractCallback],
    throw: bool,
    solution: Callable[[], Any],
    evaluates: bool,
) -> Any:
    """Take outer steps until done, stopped, failed (under `throw`) or converged.

    **Arguments:**

    - `run`: the run.
    - `steps_per_call`, `atol`, `callbacks`, `throw`: as in [`metaopt.solve_bilevel`][].
    - `solution`: a function that makes the solution of what was reached.
    - `evaluates`: whether that compiles and runs an evaluation.

    **Returns:**

    The solution. An error of a callback or of the data has it as an attribute.
    """
    # A stable sort: the others keep their order.
    opening = sorted(callbacks, key=lambda callback: not callback.opens_first)
    callbacks = sorted(callbacks, key=lambda one: (one.opens_first, not one.goes_back))
    try:
        _take_all(run, steps_per_call, atol, opening, callbacks, throw)
        for callback in callbacks if evaluates else ():
            callback.evaluate(run)
    except Exception as error:
        if run.num_taken:
            attach_solution(error, solution)
        raise
    made = solution()
    try:
        for callback in callbacks:
            callback.end(run, made)
    except Exception as error:
        attach_solution(error, lambda: made)
        raise
    return made


def _take_all(
    run: Run,
    steps_per_call: int,
    atol: float | None,
    opening: Sequence[AbstractCallback],
    callbacks: Sequence[AbstractCallback],
    throw: bool,
) -> None:
    # Each that was opened is closed, even where another fails.
    with contextlib.ExitStack() as opened:
        try:
            for callback in opening:
                if ends_run(callback.open, run):
                    run.ended_by = name_of(callback)
                opened.callback(callback.close, run)
            # Around the handlers that a callback may have installed.
            opened.enter_context(run.interrupts.caught())
            if run.has_converged(atol):
                run.ended_by = _CONVERGED
            for feed in run.feeds:
                feed.begin(run.num_steps)
            while run.num_steps < run.total and not run.ended_by:
                count = min(steps_per_call, run.total - run.num_steps)
                for feed in run.feeds:
                    count = feed.pull(count)
                if not count:
                    if any(feed.interrupted for feed in run.feeds):
                        raise KeyboardInterrupt
                    if not is_failure(run.result):
                        run.result = RESULTS.outer_data_exhausted
                    run.ended_by = "the end of the data"
                    return
                if run.advance(count, steps_per_call, atol, throw):
                    run.ended_by = "a failed step" if run.failed else _CONVERGED
                # Each of them sees every step, whichever ends the run.
                answers = [(name_of(c), ends_run(c.see, run)) for c in callbacks]
                ending = [name for name, answer in answers if answer]
                if run.going_back is not None and not (ending or run.interrupted):
                    run.go_back()
                    continue
                run.ended_by = run.ended_by or ", ".join(ending)
        except KeyboardInterrupt:
            run.interrupted = True
            run.ended_by = INTERRUPT
            if not is_failure(run.result):
                run.result = RESULTS.interrupted
    if not run.ended_by:
        run.ended_by = _ALL_TAKEN
        if atol is not None and not is_failure(run.result):
            run.result = RESULTS.outer_max_steps


_CONVERGED = "`atol`"
_ALL_TAKEN = "`num_steps`"


def is_failure(result: Any) -> bool:
    """Whether a result is one."""
    return bool(result != RESULTS.successful)


_SUCCESS: Any = RESULTS.successful
_SUCCESS_CODE = np.asarray(_SUCCESS._value)


def _first(result: Any, codes: np.ndarray) -> Any:
    """The first failure: that result, or the first failure among these codes."""
    failures = codes[codes != _SUCCESS_CODE]
    if not failures.size or is_failure(result):
        return result
    code = np.asarray(failures[0], np.int32)
    return eqx.tree_at(lambda item: item._value, _SUCCESS, code)
