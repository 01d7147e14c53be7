"""The nested solver: an inner solve inside every outer step."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._adjoint import AbstractAdjoint, AbstractSystemAdjoint, first_carry
from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import split_trainable, tree_strong
from .._core._types import (
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._core._validate import (
    ADJOINT_EXAMPLE,
    check_count,
    check_kind,
    check_params,
    DESCENT_EXAMPLE,
)
from .._core._warn import warn
from .._data import AbstractData
from .._objective import check_sources, Continued, Objective
from .._problem import BilevelProblem, initialise
from .._promises import all_finite, keep_where, overflowed
from .._report import CountsWork, InnerInfo, Report, Work
from .._solver import AbstractIterativeSolver, AbstractSolver, can_go_on
from ._base import AbstractBilevelSolver, BilevelEvaluation, BilevelStep
from ._drawn import Cursors, draw, DrawnBatches, first_cursors
from ._lanes import (
    first_lane,
    first_result,
    mean_over_lanes,
    num_lanes,
    over_lanes,
    report_of_lanes,
)
from ._optimizer_step import optimizer_step
from ._start import AbstractStart, ColdStart
from ._tolerance import AbstractTolerance


class NestedState(eqx.Module):
    """The state that one outer step hands to the next.

    **Attributes:**

    - `hyper`: the outer variables.
    - `params`, `model_state`: the last inner solution.
    - `solver_state`: the state of the inner solver there, where the start carries it
        over; else `None`.
    - `given`, `first_model_state`: the start that the user gave, or `None`.
    - `outer_state`: the state of the outer optimizer.
    - `carry`: what the adjoint carries over, such as the last linear solution.
    - `cursors`: the cursors of `train` and `valid`: the batches that come next.
    - `key`, `num_steps`: the randomness of the run, and the outer steps taken.
    - `num_lanes`: the number of inner solves in each outer step. If there are several,
        `params`, `model_state`, `solver_state`, `carry` and `cursors` have a leading axis
        of them.
    """

    hyper: Hyper
    params: Params
    model_state: ModelState
    solver_state: Any
    given: Params | None
    first_model_state: ModelState
    outer_state: Any
    carry: Any
    cursors: Cursors
    key: Key
    num_steps: IntScalar
    num_lanes: int = eqx.field(default=1, static=True)


class _Lane(eqx.Module):
    """The part of a state that belongs to one inner solve."""

    params: Params
    model_state: ModelState
    solver_state: Any
    carry: Any
    cursors: Cursors


class _Found(eqx.Module):
    """One hypergradient, its outer loss, its report and its lane."""

    gradient: Vector
    value: FloatScalar
    report: Report
    lane: _Lane


class NestedSolver(AbstractBilevelSolver):
    """Gradient descent on `hyper`, with an inner solve inside every outer step.

    Three choices that know nothing of each other, and a start. An adjoint that keeps
    something worth carrying over, like the solution of the linear system, is given it
    back at the next step.

    **Arguments:**

    - `inner`: how the inner problem is solved.
    - `adjoint`: how the derivative passes through the inner solve.
    - `outer`: the optax transform that updates `hyper`.
    - `start`: [`metaopt.ColdStart`][], [`metaopt.WarmStart`][] or
        [`metaopt.Windows`][].
    - `tolerance`: how exact each outer step is to be, such as
        [`metaopt.PolynomialTolerance`][]; by default as exact as the solvers ask for.
        The inner solution that is returned at the end is always that exact.
    - `num_seeds`: over how many inner solves each outer step averages, each with its own
        initialisation and minibatches; they are vectorised. For settings that are good on
        average and not for one seed. The params of the solution are those of the first.
        Data that are [`metaopt.Folds`][] have one inner solve for each fold.

    **Raises:**

    `ValueError` where one of these is of the wrong kind, and for a tolerance with an
    adjoint that takes no notice of it.
    """

    inner: AbstractSolver
    adjoint: AbstractAdjoint
    outer: optax.GradientTransformation
    start: AbstractStart = ColdStart()
    tolerance: AbstractTolerance | None = None
    num_seeds: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        check_count(self.num_seeds, "num_seeds")
        check_kind(self.inner, AbstractSolver, "inner", DESCENT_EXAMPLE)
        check_kind(self.adjoint, AbstractAdjoint, "adjoint", ADJOINT_EXAMPLE)
        transform = optax.GradientTransformation
        check_kind(self.outer, transform, "outer", "optax.adam(0.01)")
        check_kind(self.start, AbstractStart, "start", "metaopt.ColdStart()")
        if self.tolerance is None:
            return
        example = "metaopt.PolynomialTolerance()"
        check_kind(self.tolerance, AbstractTolerance, "tolerance", example)
        if not isinstance(self.adjoint, AbstractSystemAdjoint):
            name = type(self.adjoint).__name__
            raise ValueError(
                f"`tolerance` would have no effect: `{name}` follows the steps of the "
                "inner solver and solves no linear system. Leave it out, or use "
                "`metaopt.ImplicitAdjoint()`."
            )

    def init(self, problem, hyper, train, valid, *, params, model_state, key):
        init_key, key, data_key = jax.random.split(key, 3)
        count = num_lanes(self.num_seeds, train, valid)
        given, given_state = params, model_state

        def lane(keys, train, valid) -> _Lane:
            init_key, data_key = keys
            params, model_state = given, given_state
            if params is None:
                params, model_state = initialise(
                    problem.inner, hyper, init_key, model_state
                )
            check_params(params)
            params, model_state = tree_strong(params), tree_strong(model_state)
            solver_state = self._first_solver_state(problem, params, hyper)
            carry = first_carry(self.adjoint, params)
            cursors = first_cursors(train, valid, data_key)
            return _Lane(params, model_state, solver_state, carry, cursors)

        if self.num_seeds > 1 and given is not None and not (train.varies or valid.varies):
            warn(
                f"`num_seeds` is {self.num_seeds}, and all inner solves start at the "
                "`params` that were given, on the same data: they are the same, unless a "
                "loss uses its `key`. Give the problem an `init_fn` in place of `params`, "
                "or use `metaopt.Minibatches`."
            )
        keys = init_key, data_key
        if count == 1:
            first = lane(keys, train, valid)
        else:
            each = [jax.random.split(k, count) for k in keys]
            first = over_lanes(lane, each, train, valid)
        outer = optax.with_extra_args_support(self.outer)
        return NestedState(
            hyper=hyper,
            params=first.params,
            model_state=first.model_state,
            solver_state=first.solver_state,
            given=given,
            first_model_state=given_state,
            outer_state=outer.init(split_trainable(hyper)[0]),
            carry=first.carry,
            cursors=first.cursors,
            key=key,
            num_steps=jnp.zeros((), int),
            num_lanes=count,
        )

    def step(self, problem, state, train, valid):
        tolerance = None if self.tolerance is None else self.tolerance.at(state.num_steps)

        def one(state, train, valid):
            return self._differentiated(problem, state, train, valid, tolerance)

        found = _over_lanes_of(state, one, train, valid)
        gradient, value, report = found.gradient, found.value, found.report
        if state.num_lanes > 1:
            gradient, value = mean_over_lanes((gradient, value))
            report = report_of_lanes(report, gradient)
        trainable, static = split_trainable(state.hyper)
        tuned, outer_state = optimizer_step(
            self.outer, gradient, state.outer_state, trainable, value
        )
        lost = overflowed((tuned, outer_state), (trainable, state.outer_state))
        lost = mask_result(lost, RESULTS.outer_step_nonfinite)
        good = all_finite(gradient, value) & (lost == RESULTS.successful)
        report = dataclasses.replace(report, result=first_failure(report.result, lost))
        keep = keep_where(good)
        lane = found.lane
        new_state = dataclasses.replace(
            state,
            hyper=eqx.combine(keep(tuned, trainable), static),
            params=keep(lane.params, state.params),
            model_state=keep(lane.model_state, state.model_state),
            solver_state=keep(lane.solver_state, state.solver_state),
            outer_state=keep(outer_state, state.outer_state),
            carry=keep(lane.carry, state.carry),
            cursors=lane.cursors,
            num_steps=state.num_steps + 1,
        )
        # A zero of a rough hypergradient is not one of the hypergradient.
        exact = None if tolerance is None else dataclasses.replace(self, tolerance=None)
        return new_state, BilevelStep(report, good, exact)

    def _differentiated(
        self,
        problem: BilevelProblem,
        state: NestedState,
        train: AbstractData,
        valid: AbstractData,
        tolerance: FloatScalar | None,
    ) -> "_Found":
        """One hypergradient, and what its lane hands to the next step."""
        drawn_train, drawn_valid, cursors = self._drawn(problem, state, train, valid)
        objective = self._objective(problem, state, drawn_train, drawn_valid, tolerance)
        output, gradient, report = objective.differentiate(
            self.adjoint, state.hyper, state.carry
        )
        outcome = output.outcome
        reached = None if state.solver_state is None else outcome.solver_state
        if reached is None and state.solver_state is not None:
            raise ValueError(
                f"`{type(self.start).__name__}` carries the state of the inner solver "
                f"over, and `{type(self.adjoint).__name__}` does not return it. Use "
                "`metaopt.WarmStart()` or another adjoint."
            )
        lane = _Lane(outcome.params, outcome.model_state, reached, output.carry, cursors)
        inner = self._told_of_start(report.inner, problem, state)
        report = dataclasses.replace(report, inner=inner)
        return _Found(gradient, output.value, report, lane)

    def evaluate(self, problem, state, train, valid):
        def one(state, train, valid):
            # The draws of the next step, which a run that goes on sees again.
            train, valid, _ = self._drawn(problem, state, train, valid)
            return self._objective(problem, state, train, valid).primal(state.hyper)

        value, outcome = _over_lanes_of(state, one, train, valid)
        result = outcome.result
        if state.num_lanes > 1:
            result, value = first_result(result), mean_over_lanes(value)
            outcome = first_lane(outcome)
        return BilevelEvaluation(
            outer_loss=value,
            params=outcome.params,
            model_state=outcome.model_state,
            result=result,
            warm_started=self.start.goes_on,
        )

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        adjoint = self.adjoint
        if not isinstance(adjoint, CountsWork):
            return None
        # Counts are summed over seeds, and an adjoint counts one inner solve.
        count = self.num_seeds
        each = {name: column / count for name, column in columns.items()}
        one = adjoint.work(each, num_hyper)
        if one is None:
            return None
        return Work(gradients=count * one.gradients, products=count * one.products)

    def hyper(self, state):
        return state.hyper

    def solution(self, state):
        return state.params if state.num_lanes == 1 else first_lane(state.params)

    def _drawn(
        self, problem, state, train, valid
    ) -> tuple[DrawnBatches, DrawnBatches, Cursors]:
        """The draws of one outer step, and the cursors past them."""
        check_sources(problem, self.inner, train, valid)
        inner = self.inner
        # A solver as a whole takes all of the data.
        num_steps = inner.num_steps if isinstance(inner, AbstractIterativeSolver) else 1
        drawn_train, train_cursor = draw(train, state.cursors.train, num_steps)
        drawn_valid, valid_cursor = draw(valid, state.cursors.valid, 1)
        return drawn_train, drawn_valid, Cursors(train_cursor, valid_cursor)

    def _objective(
        self, problem, state, train, valid, tolerance: FloatScalar | None = None
    ) -> Objective:
        params, model_state = self.start.begin(
            state.given, state.params, state.first_model_state, state.model_state
        )
        key = jax.random.fold_in(state.key, state.num_steps)
        goes_on = self.start.goes_on_at(state.num_steps)
        continued = None
        if goes_on is not None:
            reached = state.params, state.model_state, state.solver_state
            continued = Continued(*reached, goes_on)
        return Objective(
            problem,
            self.inner,
            train,
            valid,
            params,
            model_state,
            key,
            tolerance,
            continued,
        )

    def _first_solver_state(
        self, problem: BilevelProblem, params: Params, hyper: Hyper
    ) -> Any:
        if self.start.goes_on_at(jnp.zeros((), int)) is None or not can_go_on(self.inner):
            return None
        assert isinstance(self.inner, AbstractIterativeSolver)
        trainable = split_trainable(params)[0]
        return tree_strong(self.inner.init(problem.inner, trainable, hyper))

    def _told_of_start(
        self, inner: InnerInfo, problem: BilevelProblem, state: NestedState
    ) -> InnerInfo:
        """The report on the inner solve and on the values that its start carries over."""
        left_out = self.adjoint.reach.earlier_path if self.start.goes_on else ()
        tells = self.start.carried and self._remembers(problem, state)
        carried = self.start.carried if tells else ""
        return dataclasses.replace(inner, left_out=left_out, carried=carried)

    def _remembers(self, problem: BilevelProblem, state: NestedState) -> bool:
        """Whether the inner solver has a state that could be carried over."""
        inner = self.inner
        if not can_go_on(inner):
            return False
        assert isinstance(inner, AbstractIterativeSolver)
        trainable = split_trainable(state.params)[0]
        init = lambda trainable, hyper: inner.init(problem.inner, trainable, hyper)
        return bool(jax.tree.leaves(eqx.filter_eval_shape(init, trainable, state.hyper)))


def _over_lanes_of(
    state: NestedState, fn: Any, train: AbstractData, valid: AbstractData
) -> Any:
    """Apply `fn(state, train, valid)` to the state of each lane, and stack."""
    if state.num_lanes == 1:
        return fn(state, train, valid)
    parts = {name: vars(state)[name] for name in _LANE}
    if state.given is None:
        parts["first_model_state"] = state.first_model_state
    numbers = jnp.arange(state.num_lanes)

    def one(lane, train, valid):
        number, parts = lane
        key = jax.random.fold_in(state.key, number)
        return fn(dataclasses.replace(state, key=key, **parts), train, valid)

    return over_lanes(one, (numbers, parts), train, valid)


_LANE = "params", "model_state", "solver_state", "carry", "cursors"
