"""Going back to sound steps at a lower rate."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._core._results import RESULTS
from .._core._validate import check_count
from .._core._warn import warn
from ._base import AbstractCallback


class Undo(eqx.Module):
    """The states that a run may go back to. A checkpoint holds them, too.

    **Attributes:**

    - `before`: the state before the last compiled call whose steps all succeeded.
    - `start`: the state after it.
    - `count`: how many times the run has gone back.
    """

    before: Any
    start: Any
    count: np.ndarray


class RollBack(AbstractCallback):
    """Goes back where a step fails, and takes the steps again at a lower outer rate.

    A step fails where the step before has led to a bad place. So the run goes back to the
    state from which that one was taken, as a whole: `hyper`, params, optimizer, batches.
    The history has the new steps in the place of those undone. After `max_times`, and if
    the first step fails at the `hyper` that was given, the run ends, or goes on, as it
    would without.

    The outer rate is lowered in the state of the optimizer, where
    `optax.inject_hyperparams` keeps it: write
    `outer=optax.inject_hyperparams(optax.adam)(0.01)`. A checkpoint has all of it, so that
    a run that goes on from one rolls back as the whole run would. Data of an iterator
    cannot be called back: the steps taken again see the batches that come next.

    **Arguments:**

    - `factor`: by which the rate is multiplied, between 0 and 1.
    - `max_times`: how many times a run goes back at most.

    **Raises:**

    `ValueError` for numbers out of range; before the first step, for an outer optimizer
    without such a rate, or with a schedule for it.
    """

    goes_back = True

    def __init__(self, factor: float = 0.5, max_times: int = 5):
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not is_number or not 0 < factor < 1:
            raise ValueError(f"`factor` must be between 0 and 1; got {factor!r}.")
        check_count(max_times, "max_times")
        self.factor = factor
        self.max_times = max_times

    def open(self, run):
        _slowed(run.state, 1.0)  # refused before the first step
        if run.undo is None:
            run.undo = Undo(run.state, run.state, np.asarray(0))

    def see(self, run):
        undo = run.undo
        if run.first_failed is None:
            run.undo = Undo(undo.start, run.state, undo.count)
            return
        # A step fails whatever the rate where none has led to it since the last return.
        is_first = int(undo.before.num_steps) == int(undo.start.num_steps)
        if undo.count >= self.max_times or (run.first_failed == 0 and is_first):
            return
        # A call whose first step failed was begun in a bad place.
        sound = undo.start if run.first_failed > 0 else undo.before
        state, rate = _slowed(sound, self.factor)
        warn(
            f"Step {run.num_steps - len(run.last['seconds']) + run.first_failed} failed. "
            f"{RESULTS[run.result].split('. ')[0].rstrip('.')}. The run goes back to step "
            f"{int(sound.num_steps)}, at an outer rate of {rate:.4g}."
        )
        run.going_back = Undo(state, state, undo.count + 1)


_Injected = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_RATE = "learning_rate"


def _slowed(state: Any, factor: float) -> tuple[Any, float]:
    """A state of a lower outer rate, and that rate.

    **Raises:**

    `ValueError` where there is no such rate in the state.
    """
    names = [name for name in ("outer_state", "hyper_state") if name in vars(state)]
    rates: list[float] = []

    def slowed(node):
        if not isinstance(node, _Injected):
            return node
        settings: Any = node.hyperparams
        if _RATE in settings:
            stateful = isinstance(node, optax.InjectStatefulHyperparamsState)
            if stateful and _RATE in node.hyperparams_states:
                raise ValueError(
                    "`RollBack` cannot lower a rate that follows a schedule. Give "
                    "`optax.inject_hyperparams` a number."
                )
            rate = jnp.asarray(factor * settings[_RATE], settings[_RATE].dtype)
            rates.append(float(rate))
            node = node._replace(hyperparams={**settings, _RATE: rate})
        return node._replace(inner_state=mapped(node.inner_state))

    def mapped(tree):
        is_injected = lambda node: isinstance(node, _Injected)
        return jax.tree.map(slowed, tree, is_leaf=is_injected)

    changed = {name: mapped(vars(state)[name]) for name in names}
    if not rates:
        raise ValueError(
            "`RollBack` lowers the outer rate in the state of the optimizer, which has "
            "none there. Write `optax.inject_hyperparams(optax.adam)(0.01)` in place of "
            "`optax.adam(0.01)`."
        )
    where = lambda tree: [vars(tree)[name] for name in names]
    return eqx.tree_at(where, state, list(changed.values())), rates[0]
