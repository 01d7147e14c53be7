"""Memory plans: the arrays that an unrolled adjoint stores, and those it recomputes."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ..._problem import in_mixed_mode
from ..._solver import Loop, LoopState


Body = Callable[[LoopState, Any], tuple[LoopState, jax.Array]]
"""`body(state, draw) -> (state, loss)`: one step."""


class AbstractMemoryPlan(eqx.Module):
    """A way to run a loop so that its reverse pass fits in memory.

    All plans give the same derivative; they trade memory for a second computation.
    """

    @abc.abstractmethod
    def prepare(self, loop: Loop) -> Loop:
        """The loop, each step of which is differentiated as this plan wants it.

        **Arguments:**

        - `loop`: the loop of a solver.

        **Returns:**

        A loop that computes the same.
        """

    @abc.abstractmethod
    def scan(
        self, body: Body, state: LoopState, draws: Any, length: int
    ) -> tuple[LoopState, jax.Array]:
        """Repeat `body` as `jax.lax.scan` does, on a loop that was prepared.

        **Arguments:**

        - `body`: `body(state, draw) -> (state, loss)`, which leaves a state alone whose
            `done` is true.
        - `state`: the state before the first step.
        - `draws`: what the steps draw, stacked.
        - `length`: the number of steps.

        **Returns:**

        The state after the last step, and the losses, `(length,)`.
        """

    @property
    @abc.abstractmethod
    def num_repeats(self) -> int:
        """The number of times that the gradient of each step is computed again, beside
        what its derivative computes."""

    @abc.abstractmethod
    def num_stored(self, length: int) -> int:
        """The least number of states that are stored at the same time.

        **Arguments:**

        - `length`: the number of steps.
        """


def remade(fn: Callable) -> Callable:
    """`fn`, which is computed again when it is differentiated."""
    # Inside a scan XLA cannot merge the two computations, so no barrier is needed.
    return jax.checkpoint(fn, prevent_cse=False)


def with_mixed_mode(loop: Loop) -> Loop:
    """The loop, each gradient of which is differentiated in mixed mode."""
    new = in_mixed_mode(loop.problem, loop.data)
    return eqx.tree_at(lambda x: (x.problem, x.data), loop, new)
