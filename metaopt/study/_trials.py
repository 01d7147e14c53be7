"""Inner solves at settings that were drawn, several in one compiled call."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._compiled import compiled
from .._core._types import Hyper
from .._objective import Objective
from ._method import Task


def trial_losses(
    task: Task, hypers: Sequence[Hyper], numbers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Solve the inner problem at each of some settings, vectorised over them.

    **Arguments:**

    - `task`: the task.
    - `hypers`: the settings, pytrees of one structure.
    - `numbers`: the numbers of the trials, by which their randomness differs.

    **Returns:**

    The outer loss of each at its inner solution, infinite where it is not finite, and the
    number of inner steps; arrays of shape `(num_trials,)`.
    """
    keys = jax.vmap(lambda number: jax.random.fold_in(task.key, number))(
        jnp.asarray(numbers)
    )
    losses, steps = _solve_all(task.problem, task.inner, *_rest(task), stack(hypers), keys)
    losses = np.asarray(losses, float)
    return np.where(np.isfinite(losses), losses, np.inf), np.asarray(steps, float)


def stack(hypers: Sequence[Hyper]) -> Hyper:
    """Pytrees of one structure as one, whose arrays have a leading axis of them."""
    parts = [eqx.partition(hyper, eqx.is_array) for hyper in hypers]
    arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[0] for part in parts))
    return eqx.combine(arrays, parts[0][1])


def _rest(task: Task) -> tuple:
    return task.train, task.valid, task.params, task.model_state


@compiled
def _solve_all(problem, inner, train, valid, params, model_state, hypers, keys):
    def one(hyper, key):
        objective = Objective(problem, inner, train, valid, params, model_state, key)
        loss, outcome = objective.primal(hyper)
        return loss, outcome.num_steps

    return eqx.filter_vmap(one)(hypers, keys)
