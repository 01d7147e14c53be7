"""The adjoint that undoes the steps of a solver."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import split_trainable, tree_add
from .._core._types import FloatScalar, Vector
from .._core._validate import check_tolerance
from .._report import inner_steps, Work
from .._solver import (
    AbstractReversibleSolver,
    InnerSolve,
    Inputs,
    once,
    outcome_of,
    Reached,
    Undone,
)
from ._base import AbstractAdjoint, HypergradientOutput
from ._bias import Bias
from ._explosion import Growth, judge_path
from ._info import ReversibleInfo
from ._reach import AbstractReach, AlongPath


class ReversibleAdjoint(AbstractAdjoint):
    r"""Reverse mode through every step of [`metaopt.ReversibleSGD`][] or
    [`metaopt.ReversiblePicard`][], each of which the reverse pass undoes.

    It gives the derivative of the steps taken, as [`metaopt.UnrolledAdjoint`][] does, with
    the memory of one step. If the steps fit in memory, the unrolled adjoint takes any
    solver, and less time.

    **`ReversibleSGD`** is undone to the last bit, for which $\log_2(1 / momentum)$ bits
    are kept for each step and parameter. Use it for long runs whose learning rates,
    momenta, schedules or initial params are tuned. The way back has to end at the initial
    params and at a velocity of zero, with every stored bit used up. The report says
    whether it did (`returned_to_start`) and how much was stored (`stored_bits`).

    **`ReversiblePicard`** is undone to rounding, and nothing is kept. Use it for
    equilibrium layers. Rounding is magnified with each step that is undone, and shows in
    how far from the start the way back ends, which the report says (`drift`). The error of
    the derivative is smaller as a rule, because what is furthest off counts for least.

    The hypergradient is NaN if a step was not undone, and the result says why.

    Not for model state that changes: freeze it. Second derivatives of what is solved are
    an error, and so is forward mode. Of the losses of a fixed point, which are norms of
    residuals, there is no derivative.

    **Arguments:**

    - `max_drift`: how far from the start the way back of
        [`metaopt.ReversiblePicard`][] may end, relative to the norm of the start or of
        the end, whichever is larger. Beyond it is a failure; `jax.numpy.inf` is never.

    **Raises:**

    `ValueError` for arguments out of range, for other solvers, and for model state that
    changes.

    ??? cite "Source"

        Maclaurin, Duvenaud, Adams: *Gradient-based hyperparameter optimization through
        reversible learning*, 2015. McCallum, Arora, Foster: *Reversible deep equilibrium
        models*, 2025.
    """

    max_drift: float = eqx.field(default=1e-2, static=True)

    reach: ClassVar[AbstractReach] = AlongPath()

    @property
    def bias(self):
        return Bias()

    def __check_init__(self):
        check_tolerance(self.max_drift, "max_drift", infinite=True, optional=False)

    def check(self, solver, data):
        if not isinstance(solver, AbstractReversibleSolver):
            raise ValueError(
                "`ReversibleAdjoint` undoes the steps of the inner solver, and those of "
                f"`{type(solver).__name__}` cannot be undone. Use `metaopt.ReversibleSGD` "
                "for a loss, `metaopt.ReversiblePicard` for a fixed point, or "
                "`metaopt.UnrolledAdjoint()`."
            )
        if not solver.keeps_model_state:
            raise ValueError(
                "`ReversibleAdjoint` cannot undo what becomes of model state under "
                f"`{type(solver.state_policy).__name__}`. Write "
                "`state_policy=metaopt.nn.FrozenState()`, or use "
                "`metaopt.UnrolledAdjoint()`."
            )

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps = inner_steps(columns)
        return Work(gradients=2 * steps + 1, products=steps)

    def solve(self, inner, params, hyper, model_state, throw):
        solver = self._reversible(inner)
        inputs = Inputs(
            split_trainable(params)[0],
            (split_trainable(hyper)[0], split_trainable(model_state)[0]),
            solver.settings(hyper),
        )
        loop = inner.loop(params)
        run = solver.reversible_run(loop, hyper, model_state, inputs, self.max_drift)
        reached, rest = run.differentiable(inputs, throw=throw)
        return outcome_of(loop, reached, rest, model_state)

    def hypergradient(self, inner, outer, start, hyper, carry):
        solver = self._reversible(inner)
        trainable, static_hyper = split_trainable(hyper)
        static_start: Any = None

        def begin(trainable):
            nonlocal static_start
            full = eqx.combine(trainable, static_hyper)
            floats, rest = split_trainable(start(full))
            arrays, static_start = eqx.partition(rest, eqx.is_array)
            return (*floats, solver.settings(full)), arrays

        (params, state, settings), pull_to_hyper, rest = jax.vjp(
            begin, trainable, has_aux=True
        )
        static_params, static_state = eqx.combine(rest, static_start)
        inputs = Inputs(params, (trainable, state), settings)
        full_params = eqx.combine(params, static_params)
        model_state = eqx.combine(state, static_state)
        loop = inner.loop(full_params)
        run = solver.reversible_run(loop, hyper, model_state, inputs, self.max_drift)
        run, inputs = once(run, inputs)
        record = run.record(inputs)
        reached, rest = record.split()
        outcome = outcome_of(loop, reached, rest, model_state)

        def outer_loss(params, state, trainable):
            return outer(
                eqx.combine(params, static_params),
                eqx.combine(trainable, static_hyper),
                eqx.combine(state, static_state),
            )

        value, pull, aux = jax.vjp(
            outer_loss, reached.params, state, trainable, has_aux=True
        )
        in_params, in_state, direct = pull(jnp.ones((), value.dtype))
        # Arrays that the problem holds are not differentiated here.
        fixed = jax.tree.map(lambda _: False, run.evaluate)
        undone = run.undo(inputs, record, Reached(in_params, None, None), (fixed, True))
        _, into = undone.cotangents
        into_hyper, into_state = into.others
        (through_start,) = pull_to_hyper(
            (into.params, tree_add(into_state, in_state), into.settings)
        )
        at_start = lambda: outer(full_params, hyper, model_state)[0]
        growth, exploded = _judged(undone, value, at_start, params)
        failed = mask_result(jnp.logical_not(undone.succeeded), run.failure)
        return HypergradientOutput(
            value=value,
            aux=aux,
            direct=direct,
            through_solution=tree_add(through_start, into_hyper),
            outcome=outcome,
            inner_residual=inner.last_residual(outcome, hyper),
            result=first_failure(failed, exploded),
            info=ReversibleInfo(
                returned_to_start=undone.returned_to_start,
                stored_bits=undone.stored_bits,
                drift=undone.drift,
                growth=growth,
            ),
            carry=None,
        )

    def _reversible(self, inner: InnerSolve) -> AbstractReversibleSolver:
        """The solver of one solve, which has to begin anew."""
        solver = inner.solver
        assert isinstance(solver, AbstractReversibleSolver)  # as `check` has seen
        if inner.earlier is not None:
            raise ValueError(
                f"`ReversibleAdjoint` undoes the steps of `{type(solver).__name__}` to "
                "where they began, and this solve goes on from the state of an earlier "
                "one. Use `metaopt.UnrolledAdjoint(metaopt.memory.RecomputeSteps())`, or "
                "begin anew: `metaopt.WarmStart()`, or no `solver_state`."
            )
        return solver


def _judged(
    undone: Undone, value: FloatScalar, at_start: Callable[[], FloatScalar], params: Vector
) -> tuple[Growth | None, RESULTS]:
    """Say whether the derivative explodes, where a run has measured it."""
    if undone.measured is None:
        return None, first_failure()
    return judge_path(undone.measured, value, at_start, params)
