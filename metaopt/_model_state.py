"""What becomes of a model's state (running statistics) in the inner loop."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp

from ._types import IntScalar, ModelState


class AbstractStatePolicy(eqx.Module):
    """How model state passes through the steps of an inner solver.

    A choice that changes results and that must be made by name: an inner problem with
    `has_state = True` is refused by a solver that was not given one.
    """

    @abc.abstractmethod
    def begin(self, state: ModelState, num_steps: int) -> ModelState:
        """The state that the loop carries, from one model state."""

    @abc.abstractmethod
    def read(self, carried: ModelState, step: IntScalar) -> ModelState:
        """The model state that the loss sees at a step."""

    @abc.abstractmethod
    def write(self, carried: ModelState, new: ModelState, step: IntScalar) -> ModelState:
        """The state that the loop carries after a step returned `new`."""

    @abc.abstractmethod
    def finish(self, carried: ModelState, num_steps: IntScalar) -> ModelState:
        """The model state at the solution, from that carried over `num_steps` steps."""


class CarriedState(AbstractStatePolicy):
    """Each step sees the state that the step before it left. The usual training."""

    def begin(self, state, num_steps):
        return state

    def read(self, carried, step):
        return carried

    def write(self, carried, new, step):
        return new

    def finish(self, carried, num_steps):
        return carried


class FrozenState(AbstractStatePolicy):
    """Every step sees the initial state; updates are dropped."""

    def begin(self, state, num_steps):
        return state

    def read(self, carried, step):
        return carried

    def write(self, carried, new, step):
        return carried

    def finish(self, carried, num_steps):
        return carried


class PerStepState(AbstractStatePolicy):
    """Each step has a state of its own (Antoniou, Edwards and Storkey, 2019).

    Step `t` sees and updates only slot `t`; the solution has the state of the last
    step. Costs `num_steps` copies of the state.
    """

    def begin(self, state, num_steps):
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_steps, *leaf.shape)), state
        )

    def read(self, carried, step):
        return jax.tree.map(lambda leaf: leaf[step], carried)

    def write(self, carried, new, step):
        return jax.tree.map(lambda a, b: a.at[step].set(b), carried, new)

    def finish(self, carried, num_steps):
        return jax.tree.map(lambda leaf: leaf[num_steps - 1], carried)
