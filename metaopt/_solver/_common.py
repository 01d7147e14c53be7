"""Checks and conditions that several solvers share."""

import equinox as eqx

from .._problem import AbstractProblem
from .._tree import split_trainable
from .._types import Batch, Hyper, Key, ModelState, Params
from ._base import AbstractIterativeSolver, Optimality


def problem_optimality(
    problem: AbstractProblem,
    params: Params,
    hyper: Hyper,
    batch: Batch,
    key: Key,
    state: ModelState,
) -> Optimality:
    """The optimality that the problem itself states."""
    static_params = split_trainable(params)[1]
    static_hyper = split_trainable(hyper)[1]

    def residual(params, hyper):
        params = eqx.combine(params, static_params)
        hyper = eqx.combine(hyper, static_hyper)
        return problem.optimality(params, hyper, batch, key, state)

    return Optimality(residual, problem.tags)


def check_state_policy(solver: AbstractIterativeSolver, problem: AbstractProblem) -> None:
    """A problem with model state needs a policy for it, and the other way round."""
    name = type(solver).__name__
    if problem.has_state and solver.state_policy is None:
        raise ValueError(
            "The inner problem has model state (`has_state = True`), and what becomes "
            f"of it must be said: write `{name}(..., state_policy=metaopt.CarriedState"
            "())`, or `FrozenState()`, or `PerStepState()`."
        )
    if not problem.has_state and solver.state_policy is not None:
        raise ValueError(
            f"`{name}` was given `state_policy` but the inner problem declares no model "
            "state. Set `has_state = True` on the problem or drop `state_policy`."
        )
