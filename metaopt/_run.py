"""The outer loop."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ._bilevel import AbstractBilevelSolver, BilevelStep
from ._data import AbstractData, as_data, restarted
from ._problem import BilevelProblem
from ._raise import attach_solution, ends_run, raise_on_failure
from ._report import BilevelSolution, History, Report
from ._results import first_failure, mask_result, RESULTS
from ._solver import Outcome
from ._tree import same_structs, tree_size
from ._types import BoolScalar, FloatScalar, Hyper, Key, ModelState, Params
from ._validate import (
    canonical_arrays,
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_callback,
    check_count,
    check_kind,
    check_not_compiled,
    check_tolerance,
    is_loader,
)


_COLUMNS = (
    "outer_loss",
    "hypergradient_norm",
    "inner_residual",
    "inner_error",
    "linear_residual",
    "num_inner_steps",
    "num_linear_steps",
    "num_products",
)

_MAX_RECORDED = 1000  # numbers in `hyper` whose path the history keeps


def solve_bilevel(
    problem: BilevelProblem,
    hyper: Hyper,
    train: Any = None,
    valid: Any = None,
    *,
    solver: AbstractBilevelSolver,
    num_steps: int,
    params: Params | None = None,
    model_state: ModelState = None,
    key: Key | None = None,
    state: Any = None,
    atol: float | None = None,
    progress: bool = False,
    callback: Callable[[int, Any, BilevelStep], Any] | None = None,
    throw: bool = True,
) -> BilevelSolution:
    """Solves a bilevel problem: tunes `hyper` for the outer loss.

    Each outer step is one compiled function, compiled once. Ctrl-C stops the run after
    the step it is in and returns what was reached.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `hyper`: where the outer variables start: any pytree with a floating-point array
        in it. Python floats become arrays.
    - `train`, `valid`: what the inner and the outer loss are evaluated on: arrays, a
        source of batches such as [`metaopt.Minibatches`][], or an iterable that yields
        either for each *outer* step (of the same shapes each time). A loader that can be
        started anew is, whenever it is exhausted. For one batch for each *inner* step
        write [`metaopt.InnerBatches`][]`(loader, num_steps)`.
    - `solver`: how the outer problem is driven, such as [`metaopt.NestedSolver`][].
    - `num_steps`: the number of outer steps, those of `state` included.
    - `params`: where the inner solve starts; by default the inner problem's `init`.
    - `model_state`: where the model state starts; with `params` only.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `state`: the `state` of a solution, to go on from, in place of `key`, `model_state`
        and what is in `hyper` and `params`. Hand over the same problem, solver and data;
        of an iterator one that goes on where it was; a loader is started anew. The history
        is that of the new steps.
    - `atol`: stop once the Euclidean norm of the hypergradient is at most this.
    - `progress`: whether to show a progress bar.
    - `callback`: called after every outer step as `callback(step, state, info)`, with a
        [`metaopt.BilevelStep`][] for `info`. It ends the run by returning `True` or
        raising `StopIteration`. Any other error that it raises has what was reached as its
        attribute `solution`.
    - `throw`: whether a failure raises. If not, the run goes on past steps that fail,
        leaves `hyper` alone where the hypergradient is not finite, and says so.

    **Returns:**

    A [`metaopt.BilevelSolution`][].

    **Raises:**

    `ValueError` and `TypeError` for arguments that do not fit and for a derivative that
    is zero by construction; [`metaopt.SolveError`][] for a numerical failure under
    `throw`, whose `value` is the solution as far as it was reached.
    """
    check_kind(problem, BilevelProblem, "problem", "metaopt.BilevelProblem(...)")
    check_kind(solver, AbstractBilevelSolver, "solver", "metaopt.NestedSolver(...)")
    check_count(num_steps, "num_steps")
    check_tolerance(atol, "atol")
    check_callback(callback)
    check_not_compiled(hyper, params)
    hyper = canonical_hyper(hyper)
    if params is not None:
        params = canonical_params(params)
    if state is not None and (key is not None or model_state is not None):
        raise ValueError(
            "`state` has the key and the model state of its run: hand over no others."
        )
    key = canonical_key(key)
    feeds = _Feed(train, "train"), _Feed(valid, "valid")
    start = solver.init(
        problem,
        hyper,
        *(feed.now for feed in feeds),
        params=params,
        model_state=model_state,
        key=key,
    )
    if state is not None:
        _check_goes_on(state, start)
        start = state
    run = _Run(problem, solver, feeds, start)
    try:
        run.go(num_steps, atol, progress, callback, throw)
    except Exception as error:
        if run.rows:
            attach_solution(error, run.solution)
        raise
    solution = run.solution()
    return raise_on_failure(solution, solution.result, throw and not run.interrupted)


def _check_goes_on(state: Any, start: Any) -> None:
    """Raises a `ValueError` unless a `state` could have come from the run that begins."""
    if type(state) is not type(start):
        raise ValueError(
            "`state` must be the `state` of a `metaopt.BilevelSolution` of the same "
            f"solver, as in `state=solution.state`; got {type(state).__name__}."
        )
    arrays = (eqx.filter(x, eqx.is_array) for x in (state, start))
    if not same_structs(*arrays):
        raise ValueError(
            "`state` is of another run: its arrays have other names, shapes or dtypes than "
            "those of this `hyper`, `params` and solver."
        )


class _NoMoreData(Exception):
    pass


class _Feed:
    """The data of one of the two losses: fixed, or pulled for every outer step."""

    def __init__(self, data: Any, name: str):
        self.name = name
        self.source = restarted(data) if _is_pulled(data) else None
        self.now: AbstractData
        if self.source is None:
            self.now = self._check(data)
        else:
            try:
                self.now = self._check(next(self.source))
            except StopIteration:
                raise ValueError(
                    f"`{name}` is an iterator or loader that yields nothing."
                ) from None
        self.fresh = True

    def advance(self) -> None:
        """Goes on to the data of the next outer step."""
        if self.source is not None and not self.fresh:
            try:
                self.now = self._check(next(self.source))
            except StopIteration:
                raise _NoMoreData from None
        self.fresh = False

    def _check(self, data: Any) -> AbstractData:
        return as_data(canonical_arrays(data, self.name), self.name)


def _is_pulled(data: Any) -> bool:
    return isinstance(data, Iterator) or is_loader(data)


class _Run:
    """One run of the outer loop, and what it has come to so far."""

    def __init__(
        self,
        problem: BilevelProblem,
        solver: AbstractBilevelSolver,
        feeds: tuple[_Feed, _Feed],
        state: Any,
    ):
        self.problem = problem
        self.solver = solver
        self.fixed = _Static.split((solver, problem))
        self.feeds = feeds
        self.state = state
        self.rows: list[dict[str, Any]] = []
        self.path: list[Hyper] = []  # the floating-point arrays of each step
        self.report: Report | None = None
        self.result: Any = RESULTS.successful
        self.interrupted = False
        self.num_skipped = 0

    def go(
        self,
        num_steps: int,
        atol: float | None,
        progress: bool,
        callback: Callable[[int, Any, BilevelStep], Any] | None,
        throw: bool,
    ) -> None:
        """Takes outer steps until done, stopped, failed (under `throw`) or converged."""
        converged = stopped = False
        taken = int(self.state.num_steps)
        bar = tqdm(total=num_steps, initial=taken, disable=not progress, unit="step")
        try:
            for index in range(taken, num_steps):
                for feed in self.feeds:
                    feed.advance()
                before, begin = self.state, time.perf_counter()
                info, seen = self._step(self.fixed)
                norm = seen.row["hypergradient_norm"]
                if atol is not None and norm <= atol and info.report.tolerance is not None:
                    # A zero of a rough hypergradient is not one of the hypergradient.
                    self.state = before
                    info, seen = self._step(
                        _Static.split((self.solver.exact, self.problem))
                    )
                self._record(info.report, seen, time.perf_counter() - begin)
                bar.update()
                bar.set_postfix(
                    loss=f"{self.rows[-1]['outer_loss']:.4g}",
                    gradient=f"{self.rows[-1]['hypergradient_norm']:.2g}",
                    refresh=False,
                )
                failed = throw and bool(seen.failed)
                if failed:
                    self.state = before  # without the update that is not to be trusted
                    if self.path:
                        hyper = self.solver.hyper(before)
                        self.path[-1] = jax.device_get(_floats(hyper))
                stopped = ends_run(callback, index, self.state, info)
                if failed:
                    return
                norm = self.rows[-1]["hypergradient_norm"]
                converged = atol is not None and norm <= atol
                if converged or stopped:
                    return
        except KeyboardInterrupt:
            self.interrupted = True
            if not _failed(self.result):
                self.result = RESULTS.interrupted
        except _NoMoreData:
            if not _failed(self.result):
                self.result = RESULTS.outer_data_exhausted
        finally:
            bar.close()
        if atol is None or converged or stopped:
            return
        if not _failed(self.result):
            self.result = RESULTS.outer_max_steps

    def solution(self) -> BilevelSolution:
        """The solution as far as it was reached."""
        train, valid = (feed.now for feed in self.feeds)
        value, outcome = _evaluate(self.solver, self.problem, self.state, train, valid)
        # The last `hyper` has not been solved for before.
        lost = mask_result(~jnp.isfinite(value), RESULTS.outer_nonfinite)
        result = first_failure(self.result, outcome.result, lost)
        names = (*_COLUMNS, "seconds")
        columns = {name: np.asarray([row[name] for row in self.rows]) for name in names}
        return BilevelSolution(
            hyper=self.solver.hyper(self.state),
            params=outcome.params,
            model_state=outcome.model_state,
            outer_loss=value,
            history=History(**columns, hyper=self._hyper_path()),
            result=result,
            report=self.report,
            state=self.state,
            num_skipped=self.num_skipped,
            warm_started=self.solver.warm_starts,
        )

    def _step(self, fixed: tuple[Any, "_Static"]) -> tuple[BilevelStep, "_Seen"]:
        train, valid = (feed.now for feed in self.feeds)
        state, info, seen = _step(*fixed, self.state, train, valid)
        # Waits for the device here, so that an interrupt finds a finished step.
        self.state, info = jax.block_until_ready((state, info))
        return info, jax.device_get(seen)

    def _record(self, report: Report, seen: "_Seen", seconds: float) -> None:
        self.report = report
        row = {name: _scalar(seen.row[name], name) for name in _COLUMNS}
        self.rows.append({**row, "seconds": seconds})
        if seen.hyper is not None:
            self.path.append(seen.hyper)
        self.num_skipped += int(seen.failed and not seen.updated)
        if seen.failed and not _failed(self.result):
            self.result = report.result

    def _hyper_path(self) -> Hyper | None:
        if not self.path:
            return None
        floats = jax.tree.map(lambda *leaves: np.stack(leaves), *self.path)
        return eqx.combine(floats, self.solver.hyper(self.state))


class _Seen(eqx.Module):
    """The part of an outer step that the host looks at, which travels at once."""

    row: dict[str, Any]  # a scalar for each column of the history, or `None`
    failed: BoolScalar
    updated: BoolScalar
    hyper: Hyper | None  # its floating-point arrays; `None` where they are many


class _Static:
    """A pytree without arrays, hashed once for all calls of a compiled function.

    At every call such arguments are hashed and compared, which takes longer than a small
    step. One object is equal to itself at once.
    """

    def __init__(self, tree: Any):
        leaves, structure = jax.tree.flatten(tree)
        self.key = tuple(leaves), structure
        try:
            self.hash = hash(self.key)
        except TypeError as error:
            raise TypeError(
                f"`problem` or `solver` holds an object that cannot be hashed ({error}), "
                "by which compiled programs are found again. Give its class a `__hash__`, "
                "or make it an `equinox.Module`."
            ) from error

    @classmethod
    def split(cls, tree: Any) -> tuple[Any, "_Static"]:
        """The arrays of a pytree, and the rest of it."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return arrays, cls(rest)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Static) and self.key == other.key)

    def joined(self, arrays: Any) -> Any:
        """The pytree that was split."""
        leaves, structure = self.key
        return eqx.combine(arrays, jax.tree.unflatten(structure, leaves))


@eqx.filter_jit
def _step(
    arrays: Any, rest: _Static, state: Any, train: AbstractData, valid: AbstractData
) -> tuple[Any, BilevelStep, _Seen]:
    solver, problem = rest.joined(arrays)
    state, info = solver.step(problem, state, train, valid)
    hyper, fields = solver.hyper(state), vars(info.report)
    seen = _Seen(
        row={name: fields[name] for name in _COLUMNS},
        failed=info.report.result != RESULTS.successful,
        updated=info.updated,
        hyper=_floats(hyper) if tree_size(hyper) <= _MAX_RECORDED else None,
    )
    return state, info, seen


@eqx.filter_jit
def _evaluate(
    solver: AbstractBilevelSolver,
    problem: BilevelProblem,
    state: Any,
    train: AbstractData,
    valid: AbstractData,
) -> tuple[FloatScalar, Outcome]:
    return solver.evaluate(problem, state, train, valid)


def _floats(hyper: Hyper) -> Hyper:
    return eqx.filter(hyper, eqx.is_inexact_array)


def _failed(result: RESULTS) -> bool:
    return bool(result != RESULTS.successful)


def _scalar(value: Any, name: str) -> float | int:
    if name.startswith("num_"):
        return 0 if value is None else int(value)
    return float("nan") if value is None else float(value)
