"""The interface of solvers whose steps can be undone, and of the runs that undo them."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ..._core._tree import split_trainable
from ..._core._types import BoolScalar, FloatScalar, Hyper, ModelState, Vector
from .._base import AbstractIterativeSolver, Outcome
from .._loop import Loop, LoopState


class Inputs(eqx.Module):
    """The inputs of a run: floating-point arrays only.

    **Attributes:**

    - `params`: the trainable part of the initial params.
    - `others`: those of `hyper` and of the model state.
    - `settings`: arrays of the solver that depend on `hyper`.
    """

    params: Vector
    others: tuple[Vector, Vector]
    settings: tuple[jax.Array, ...]


class Reached(eqx.Module):
    """The differentiable results of a run."""

    params: Vector
    losses: Any
    aux: Any


class Record(eqx.Module):
    """The end of a run, from which it can be undone."""

    state: LoopState
    losses: jax.Array

    def split(self) -> tuple[Reached, LoopState]:
        """The differentiable part, and all the rest of an outcome."""
        aux, rest = split_trainable(self.state.aux)
        state = eqx.tree_at(
            lambda s: (s.params, s.solver_state, s.model_state, s.aux),
            self.state,
            (None, None, None, rest),
            is_leaf=lambda x: x is None,
        )
        return Reached(self.state.params, self.losses, aux), state


class Undone(eqx.Module):
    """A run that has been undone.

    **Attributes:**

    - `cotangents`: those of `(run.evaluate, inputs)`; NaN where it has failed.
    - `succeeded`: whether the way back ended where it should.
    - `returned_to_start`, `stored_bits`, `drift`: as in
        [`metaopt.extend.ReversibleInfo`][].
    - `measured`: what a gauge has measured on the way, or `None`.
    """

    cotangents: tuple[Any, Inputs]
    succeeded: BoolScalar
    returned_to_start: BoolScalar | None = None
    stored_bits: FloatScalar | None = None
    drift: FloatScalar | None = None
    measured: jax.Array | None = None


class AbstractRun(eqx.Module):
    """The steps of one solve and their inverses, as functions that close over arrays
    alone.

    **Attributes:**

    - `evaluate`: what a step evaluates, and the way back again. The floating-point arrays
        that it holds are all that a run does.
    """

    evaluate: eqx.AbstractVar[Callable]

    @property
    @abc.abstractmethod
    def failure(self) -> Any:
        """The result code for steps that were not undone to their start."""

    @abc.abstractmethod
    def record(self, inputs: Inputs) -> Record:
        """All of the steps."""

    @abc.abstractmethod
    def differentiable(self, inputs: Inputs, *, throw: bool) -> tuple[Reached, LoopState]:
        """The result of the run, differentiable once, in reverse mode.

        **Arguments:**

        - `inputs`: what the run starts from.
        - `throw`: whether a run that was not undone to its start raises; otherwise the
            derivative is NaN.
        """

    @abc.abstractmethod
    def undo(
        self, inputs: Inputs, record: Record, cotangent: Reached, moving: Any
    ) -> Undone:
        """The derivative of the run, which is undone during the reverse pass.

        **Arguments:**

        - `inputs`, `record`: what the run started from and what it came to.
        - `cotangent`: of what it came to, with `None` for zero.
        - `moving`: which arrays of `(evaluate, inputs.others)` are differentiated.
        """


class AbstractSharedRun(AbstractRun):
    """A run of one example that can become that of many, which share some arrays."""

    @abc.abstractmethod
    def for_examples(
        self, inputs: Inputs, axes: tuple[Any, Inputs], axis_name: Any
    ) -> "AbstractSharedRun":
        """A run, some of whose arrays have got an axis of examples, as the run of all.

        **Arguments:**

        - `inputs`: what it starts from.
        - `axes`: like the run and the inputs, with 0 for an array with such an axis, and
            `None` for what all examples share.
        - `axis_name`: the name of the axis.
        """


class AbstractReversibleSolver(AbstractIterativeSolver):
    """A solver whose steps can be undone."""

    @abc.abstractmethod
    def settings(self, hyper: Hyper) -> tuple[jax.Array, ...]:
        """The arrays of the solver that depend on `hyper`.

        **Arguments:**

        - `hyper`: the outer variables.
        """

    @abc.abstractmethod
    def reversible_run(
        self,
        loop: Loop,
        hyper: Hyper,
        model_state: ModelState,
        inputs: Inputs,
        max_drift: float,
    ) -> AbstractRun:
        """The steps of one solve and their inverses.

        **Arguments:**

        - `loop`: the loop of the solver.
        - `hyper`, `model_state`: give the leaves that are no floating-point arrays.
        - `inputs`: what the run starts from.
        - `max_drift`: how far from the start a way back that is not exact may end,
            relative to the norm of the start or of the end, whichever is larger.
        """


def outcome_of(
    loop: Loop, reached: Reached, rest: LoopState, model_state: ModelState
) -> Outcome:
    """The outcome; model state that is frozen comes out as it went in."""
    state = eqx.tree_at(
        lambda s: (s.params, s.model_state, s.aux),
        rest,
        (reached.params, model_state, eqx.combine(reached.aux, rest.aux)),
        is_leaf=lambda x: x is None,
    )
    return loop.finish(state, reached.losses)
