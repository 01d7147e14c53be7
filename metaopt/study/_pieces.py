"""Inner solves in several pieces, with a look at the outer loss after each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._core._compiled import compiled
from .._core._tree import split_trainable, tree_strong
from .._core._types import Hyper, Key
from .._objective import Objective
from .._solver import AbstractIterativeSolver, can_go_on, Earlier
from ._method import Task
from ._trials import stack


def check_pieces(task: Task, whose: str, instead: str) -> None:
    """Check that an inner solve can be done in pieces.

    **Arguments:**

    - `task`: the task.
    - `whose`: the method that needs it, in words.
    - `instead`: another one, that does not.

    **Raises:**

    `ValueError` for an inner solver that cannot go on from its own state or may stop early,
    and for a [`metaopt.BatchSequence`][] as training data.
    """
    solver = task.inner
    if not (isinstance(solver, AbstractIterativeSolver) and can_go_on(solver)):
        raise ValueError(
            f"{whose} trains settings further, and `{type(solver).__name__}` cannot go on "
            f"from its own state. Use `metaopt.Descent`, or {instead}."
        )
    if solver.stops_early:
        raise ValueError(
            f"{whose} compares settings after the same number of inner steps, and this "
            "inner solver may stop before. Drop its tolerance."
        )
    if task.train.num_batches is not None:
        raise ValueError(
            f"{whose} trains in several pieces, each of which would begin at the first "
            "batch of a `BatchSequence`. Use `metaopt.Minibatches` or plain arrays as "
            "`train`."
        )


def train_on(
    task: Task, more: int, hypers: Sequence[Hyper], states: Any, start_key: Key, key: Key
) -> tuple[np.ndarray, Any]:
    """Train settings for some more steps.

    **Arguments:**

    - `task`: the task.
    - `more`: the number of steps.
    - `hypers`: the settings, pytrees of one structure.
    - `states`: those of the call before; `None` in the first.
    - `start_key`, `key`: the randomness of the start, and that of these steps.

    **Returns:**

    The outer losses, infinite where they are not finite, of shape `(num_settings,)`; and
    the states to go on from, stacked.
    """
    inner = dataclasses.replace(task.inner, num_steps=more)
    data = task.train, task.valid, task.params, task.model_state
    stacked = stack(hypers)
    losses, states = _advance(task.problem, inner, *data, stacked, states, start_key, key)
    losses = np.asarray(losses, float)
    return np.where(np.isfinite(losses), losses, np.inf), states


@compiled
def _advance(
    problem, inner, train, valid, params, model_state, hypers, states, start_key, key
):
    def one(hyper, state):
        # The start is that of the bracket, the draws are those of the rung.
        begin = Objective(problem, inner, train, valid, params, model_state, start_key)
        if state is None:
            start, first_state = begin.start(hyper)
            solver_state = tree_strong(
                inner.init(problem.inner, split_trainable(start)[0], hyper)
            )
        else:
            start, first_state, solver_state = state
        objective = Objective(problem, inner, train, valid, params, model_state, key)
        earlier = Earlier(solver_state, jnp.asarray(state is not None))
        solve = dataclasses.replace(objective.solve, earlier=earlier)
        outcome = solve.primal(start, hyper, first_state)
        loss, _ = objective.outer(outcome.params, hyper, outcome.model_state)
        return loss, (outcome.params, outcome.model_state, outcome.solver_state)

    return eqx.filter_vmap(one)(hypers, states)
