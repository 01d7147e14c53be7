"""Policies for a model's state (running statistics) in the inner loop."""

import abc
from typing import ClassVar, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._types import IntScalar, ModelState
from .._core._validate import check_count


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class AbstractStatePolicy(eqx.Module):
    """A policy for model state in the steps of an inner solver.

    A choice that changes results and that must be made by name: an inner problem with
    `has_state = True` is refused by a solver that was not given one.
    """

    is_constant: AbstractClassVar[bool]
    """Whether the model state at the solution is that at the start."""

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

    is_constant: ClassVar[bool] = False

    def begin(self, state, num_steps):
        return _one(state)

    def read(self, carried, step):
        return carried

    def write(self, carried, new, step):
        return new

    def finish(self, carried, num_steps):
        return carried


class FrozenState(AbstractStatePolicy):
    """Every step sees the initial state; updates are dropped."""

    is_constant: ClassVar[bool] = True

    def begin(self, state, num_steps):
        return _one(state)

    def read(self, carried, step):
        return carried

    def write(self, carried, new, step):
        return carried

    def finish(self, carried, num_steps):
        return carried


class StepStates(eqx.Module):
    """Model states that outlast an inner solve, one for each of its steps.

    Start of [`metaopt.nn.PerStepState`][] for statistics of each step that are gathered
    over many solves: over the tasks of few-shot learning, say, where the `model_state` that
    a learner takes and returns is one of these.

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo

        states = mo.extend.StepStates({"mean": jnp.zeros(3)}, num_steps=5)
        states.last  # {"mean": jnp.zeros(3)}
        ```

    **Arguments:**

    - `state`: the model state that each step begins with.
    - `num_steps`: the number of steps.

    **Attributes:**

    - `states`: like `state`, with a leading axis of steps.
    - `step`: the place of the last step that was taken.
    - `last`: the state of that step, which the solution has.

    **Raises:**

    `ValueError` where `num_steps` is no positive int.
    """

    states: ModelState
    step: IntScalar

    def __init__(self, state: ModelState, num_steps: int):
        check_count(num_steps, "num_steps")
        self.states = _stacked(state, num_steps)
        self.step = jnp.asarray(num_steps - 1)

    @property
    def last(self) -> ModelState:
        return jax.tree.map(lambda leaf: leaf[self.step], self.states)

    def with_last(self, state: ModelState) -> "StepStates":
        """The same with another state of the last step."""
        put = lambda leaf, new: leaf.at[self.step].set(new)
        return eqx.tree_at(lambda s: s.states, self, jax.tree.map(put, self.states, state))

    def at(self, step: IntScalar) -> "StepStates":
        """The same after this step. Those beyond the last place share it."""
        size = jax.tree.leaves(self.states)[0].shape[0]
        step = jnp.clip(step, 0, size - 1).astype(self.step.dtype)
        return eqx.tree_at(lambda s: s.step, self, step)


class PerStepState(AbstractStatePolicy):
    """Each step has a state of its own (Antoniou, Edwards and Storkey, 2019).

    Step `t` sees and updates only slot `t`; the solution has the state of the last
    step taken. Costs `num_steps` copies of the state.

    From one model state every slot begins with that. From [`metaopt.extend.StepStates`][]
    each begins where it was left, and the solution has all of them; steps beyond the last
    slot share it.
    """

    is_constant: ClassVar[bool] = False

    def begin(self, state, num_steps):
        return state if isinstance(state, StepStates) else _stacked(state, num_steps)

    def read(self, carried, step):
        if isinstance(carried, StepStates):
            return carried.at(step).last
        return jax.tree.map(lambda leaf: leaf[step], carried)

    def write(self, carried, new, step):
        if isinstance(carried, StepStates):
            return carried.at(step).with_last(new)
        return jax.tree.map(lambda leaf, a: leaf.at[step].set(a), carried, new)

    def finish(self, carried, num_steps):
        if isinstance(carried, StepStates):
            return carried.at(num_steps - 1)
        return jax.tree.map(lambda leaf: leaf[num_steps - 1], carried)


def _one(state: ModelState) -> ModelState:
    if isinstance(state, StepStates):
        raise ValueError(
            "`StepStates` are for a solver with `state_policy=metaopt.nn.PerStepState()`; "
            "the others take one model state."
        )
    return state


def _stacked(state: ModelState, num_steps: int) -> ModelState:
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_steps, *jnp.shape(leaf))), state
    )
