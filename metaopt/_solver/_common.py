"""Checks and conditions that several solvers share."""

import equinox as eqx
import jax.numpy as jnp

from .._core._results import RESULTS, where_result
from .._core._tree import split_trainable
from .._core._types import Batch, Hyper, Key, ModelState, Params
from .._data import AbstractData
from .._problem import AbstractPredictionProblem, AbstractProblem
from ._base import (
    AbstractDirectSolver,
    AbstractIterativeSolver,
    Composition,
    Optimality,
    Outcome,
)


def problem_optimality(
    problem: AbstractProblem,
    params: Params,
    hyper: Hyper,
    batch: Batch,
    key: Key,
    state: ModelState,
) -> Optimality:
    """The optimality that the problem itself states."""
    static = split_trainable((params, hyper))[1]

    def residual(params, hyper):
        params, hyper = eqx.combine((params, hyper), static)
        return problem.optimality(params, hyper, batch, key, state)

    if not isinstance(problem, AbstractPredictionProblem):
        return Optimality(residual, problem.tags)

    def predict(params, hyper):
        params, hyper = eqx.combine((params, hyper), static)
        return problem.evaluate_predictions(params, hyper, batch, key, state)[0]

    def criterion(predictions, params, hyper):
        params, hyper = eqx.combine((params, hyper), static)
        return problem.evaluate_criterion(predictions, params, hyper, batch, key)[0]

    return Optimality(residual, problem.tags, Composition(predict, criterion))


def check_state_policy(solver: AbstractIterativeSolver, problem: AbstractProblem) -> None:
    """A problem with model state needs a policy for it, and a policy needs model state."""
    name = type(solver).__name__
    if problem.has_state and solver.state_policy is None:
        raise ValueError(
            "The inner problem has model state (`has_state = True`), and the solver needs "
            f"a policy for it: `{name}(..., state_policy=metaopt.nn.CarriedState())`, or "
            "`metaopt.nn.FrozenState()`, or `metaopt.nn.PerStepState()`."
        )
    if not problem.has_state and solver.state_policy is not None:
        raise ValueError(
            f"`{name}` was given `state_policy` but the inner problem declares no model "
            "state. Set `has_state = True` on the problem or drop `state_policy`."
        )


def check_stopping(
    solver: AbstractIterativeSolver, data: AbstractData, tolerance: str
) -> None:
    """A tolerance needs a residual that goes to zero."""
    if solver.stops_early and data.varies:
        raise ValueError(
            f"`{type(solver).__name__}({tolerance}=...)` stops on the norm of a residual, "
            f"which minibatches keep away from zero. Write `{tolerance}=None`, or hand "
            "over plain arrays."
        )


def direct_outcome(problem, params, evaluation, result, num_steps) -> Outcome:
    """The outcome of a solve that ran as a whole."""
    ours = result
    for theirs, code in (
        (RESULTS.nonlinear_max_steps_reached, RESULTS.inner_max_steps),
        (RESULTS.nonlinear_divergence, RESULTS.inner_diverged),
        (RESULTS.nonfinite, RESULTS.inner_nonfinite),
    ):
        ours = where_result(result == theirs, code, ours)
    num_steps = jnp.asarray(num_steps)
    failed = (ours == RESULTS.inner_nonfinite) | (ours == RESULTS.inner_diverged)
    return Outcome(
        params=params,
        model_state=None,
        aux=evaluation.aux if problem.has_aux else None,
        result=ours,
        num_steps=num_steps,
        losses=None,
        failed_step=jnp.where(failed, num_steps, -1),
    )


def refuse_state(solver: AbstractDirectSolver, problem: AbstractProblem) -> None:
    """Raise a `ValueError` for a problem with model state."""
    if problem.has_state:
        raise ValueError(
            f"`{type(solver).__name__}` cannot carry model state. Use `metaopt.Descent` "
            "with a `state_policy`, or keep the statistics out of the inner problem."
        )
