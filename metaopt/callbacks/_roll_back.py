"""A run that is taken back before a failure."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import optax

from .._core._results import RESULTS
from .._core._validate import check_count
from ._base import AbstractCallback


@runtime_checkable
class _HasOuterState(Protocol):
    @property
    def outer_state(self) -> Any: ...


class RollBack(AbstractCallback):
    """Takes a run back where steps fail, and goes on at a lower outer learning rate.

    A step whose numbers are not finite leaves `hyper` alone, and the next one often fails
    in the same way: the last good step was too long. This goes back to the state before
    it, multiplies the learning rate of the outer optimizer by `factor`, and goes on. The
    history keeps the steps that were undone.

    For runs under `throw=False`. The learning rate has to be in the state of the
    optimizer: `outer=optax.inject_hyperparams(optax.adam)(learning_rate=0.1)`.

    **Arguments:**

    - `factor`: of the learning rate, between 0 and 1.
    - `max_times`: how often a run is taken back; the failure after that ends it.

    **Raises:**

    `ValueError` for numbers out of range; and before the first step where the state of the
    outer optimizer has no learning rate.
    """

    def __init__(self, factor: float = 0.5, max_times: int = 5):
        if not isinstance(factor, int | float) or not 0 < factor < 1:
            raise ValueError(f"`factor` must lie between 0 and 1; got {factor!r}.")
        check_count(max_times, "max_times")
        self.factor = factor
        self.max_times = max_times
        self.times = 0
        self._rate: Any = None
        self._num_skipped = 0
        self._good: list[Any] = []  # the last states without a failure, two at most
        self._codes: tuple[Any, Any] = RESULTS.successful, RESULTS.successful

    def open(self, run):
        state = run.state
        found = []
        if isinstance(state, _HasOuterState):
            found = optax.tree_utils.tree_get_all_with_path(
                state.outer_state, "learning_rate"
            )
        if not found:
            raise ValueError(
                "`RollBack` lowers the learning rate in the state of the outer optimizer, "
                "which has none. Write `outer=optax.inject_hyperparams(optax.adam)("
                "learning_rate=0.1)`, or another transform in place of Adam."
            )
        self._rate = found[0][1]
        self.times, self._good = 0, [state]
        self._note(run)

    def see(self, run):
        if run.num_skipped == self._num_skipped:
            self._good = [*self._good[-1:], run.state]
            self._note(run)
            return False
        if self.times == self.max_times or run.failed:
            return True
        self.times += 1
        self._rate = self._rate * self.factor
        self._good = self._good[:1]
        state = self._good[0]
        rate = jnp.asarray(self._rate)
        outer_state = optax.tree_utils.tree_set(state.outer_state, learning_rate=rate)
        run.state = eqx.tree_at(lambda state: state.outer_state, state, outer_state)
        run.result, run.reason = self._codes
        self._num_skipped = run.num_skipped
        return False

    def _note(self, run: Any) -> None:
        self._num_skipped = run.num_skipped
        self._codes = run.result, run.reason
