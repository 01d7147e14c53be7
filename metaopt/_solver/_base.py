"""The interface of inner solvers: by steps, or as a whole."""

import abc
from typing import Any

import equinox as eqx

from .._core._results import RESULTS
from .._core._types import (
    Aux,
    Batch,
    BoolScalar,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._data import AbstractData
from .._problem import AbstractProblem, AbstractStatePolicy


class Composition(eqx.Module):
    """A loss as a criterion of a model's output, for one problem, batch and key.

    **Attributes:**

    - `predict`: `predict(params, hyper)` on the *trainable* parts of both; a pytree.
    - `criterion`: `criterion(predictions, params, hyper)`, likewise; a scalar.
    """

    predict: Any
    criterion: Any


class Optimality(eqx.Module):
    """The condition that a solver's answer satisfies, for one problem, batch and key.

    **Attributes:**

    - `fn`: `fn(params, hyper)` on the *trainable* parts of both; a vector like
        `params` that is zero at the solution.
    - `tags`: the `lineax` tags promised by its Jacobian in `params`.
    - `composition`: where `fn` is the gradient of a criterion of a model's output, that
        loss in its two parts; else `None`.
    """

    fn: Any
    tags: frozenset[object] = eqx.field(static=True)
    composition: Composition | None = None

    def __call__(self, params: Vector, hyper: Vector) -> Vector:
        """The residual at `params`, `hyper`; a vector like `params`."""
        return self.fn(params, hyper)

    def converted(self, params: Vector, hyper: Vector) -> "Optimality":
        """The same, with all arrays that its functions close over as leaves.

        **Arguments:**

        - `params`, `hyper`: an example of what it will be called with.

        **Returns:**

        An optimality.
        """
        composition = self.composition
        if composition is not None:
            predictions = eqx.filter_eval_shape(composition.predict, params, hyper)
            composition = Composition(
                eqx.filter_closure_convert(composition.predict, params, hyper),
                eqx.filter_closure_convert(
                    composition.criterion, predictions, params, hyper
                ),
            )
        fn = eqx.filter_closure_convert(self.fn, params, hyper)
        return Optimality(fn, self.tags, composition)


class Outcome(eqx.Module):
    """The result of an inner solve.

    **Attributes:**

    - `params`: the solution.
    - `model_state`: the model state there, or `None`.
    - `aux`: the auxiliary output of the last evaluation, or `None`.
    - `result`: how the solve ended.
    - `num_steps`: the number of steps taken.
    - `losses`: the inner loss at the start of each step, `(num_steps,)`, padded with
        NaN (infinity under `jax_debug_nans`) after an early stop; `None` where the solver
        does not see losses.
    - `failed_step`: the first step at which something was not finite, or -1.
    - `solver_state`: the solver's own state after the last step (momenta and the like);
        `None` where the solver or the adjoint does not hand it on.
    - `loss`: the inner loss at the solution, on the batch of the last step; `None` where
        the problem has none, and where it has not been looked at yet.
    - `num_flat`: the sum over the steps of that of [`metaopt.extend.StepOutput`][].
    """

    params: Params
    model_state: ModelState
    aux: Aux
    result: RESULTS
    num_steps: IntScalar
    losses: Any
    failed_step: IntScalar
    solver_state: Any = None
    loss: FloatScalar | None = None
    num_flat: IntScalar | None = None


class StepOutput(eqx.Module):
    """The report of one step of an iterative solver.

    **Attributes:**

    - `monitor`: a scalar that is infinite or NaN where the step failed, and grows where
        the steps diverge: a norm of the gradient or of the residual, or the loss.
    - `converged`: whether the tolerance is met, or `None` if none was asked for.
    - `model_state`: the model state after the step, or `None`.
    - `aux`: the auxiliary output of the problem, or `None`.
    - `result`: a failure that `monitor` does not show, or `None` where a solver knows of
        none.
    - `loss`: what `losses` record of the step, or `None` for the monitor.
    - `stops`: whether this was the last step, converged or not; `None` for a solver that
        leaves this to `num_steps`.
    - `num_flat`: the number of entries of the gradient at which the derivative of the
        step was left out, because they are zero and the slope there says nothing about
        any other gradient; `None` for a solver that leaves out none.
    """

    monitor: FloatScalar
    converged: BoolScalar | None
    model_state: ModelState
    aux: Aux
    result: Any = None
    loss: FloatScalar | None = None
    stops: BoolScalar | None = None
    num_flat: IntScalar | None = None


class AbstractSolver(eqx.Module):
    """A solver of inner problems."""

    @abc.abstractmethod
    def check(self, problem: AbstractProblem, data: AbstractData) -> None:
        """Raise a `ValueError` if this solver cannot serve the problem or the data."""

    @abc.abstractmethod
    def optimality(
        self,
        problem: AbstractProblem,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key,
        state: ModelState,
    ) -> Optimality:
        """The condition that this solver's answer satisfies.

        **Arguments:**

        - `problem`: the inner problem.
        - `params`, `hyper`: give the leaves that are not trained; only the trainable
            parts of both vary.
        - `batch`, `key`, `state`: what the problem is evaluated on, fixed.

        **Returns:**

        A [`metaopt.extend.Optimality`][].
        """


class AbstractIterativeSolver(AbstractSolver):
    """A solver that proceeds by steps, each of which can be differentiated.

    Adjoints that follow the path of the solver need one of these.
    """

    num_steps: eqx.AbstractVar[int]
    state_policy: eqx.AbstractVar[AbstractStatePolicy | None]

    @property
    @abc.abstractmethod
    def stops_early(self) -> bool:
        """Whether a tolerance can end the loop before `num_steps`."""

    @property
    def keeps_model_state(self) -> bool:
        """Whether the model state at the solution is that at the start."""
        return self.state_policy is None or self.state_policy.is_constant

    @abc.abstractmethod
    def init(self, problem: AbstractProblem, params: Vector, hyper: Hyper) -> Any:
        """The solver's state before the first step (momenta and the like).

        **Arguments:**

        - `problem`, `hyper`: the inner problem and the outer variables.
        - `params`: the trainable part of the initial params.

        **Returns:**

        A pytree of arrays, which a compiled loop carries.
        """

    @abc.abstractmethod
    def step(
        self,
        problem: AbstractProblem,
        params: Params,
        solver_state: Any,
        hyper: Hyper,
        batch: Batch,
        key: Key,
        model_state: ModelState,
    ) -> tuple[Params, Any, StepOutput]:
        """One step, as plain traceable code.

        **Arguments:**

        - `problem`, `hyper`: the inner problem and the outer variables.
        - `params`: the params, trainable and other leaves.
        - `solver_state`: what `init` or the step before returned.
        - `batch`, `key`, `model_state`: what the problem is evaluated on at this step.

        **Returns:**

        The new params and the new solver state, both with the shapes and dtypes of the
        old ones, and a [`metaopt.extend.StepOutput`][].
        """


class AbstractMixingSolver(AbstractIterativeSolver):
    """A solver by steps, each of which mixes earlier iterates or maps into the new one.

    The derivative of its last step alone is therefore no one-step estimate.
    """


class AbstractBestIterateSolver(AbstractMixingSolver):
    """A solver by steps that answers with the best of its iterates, not the last."""

    @abc.abstractmethod
    def conclude(
        self, params: Vector, solver_state: Any, converged: BoolScalar
    ) -> tuple[Vector, Any]:
        """The answer of the solver once the loop has ended.

        **Arguments:**

        - `params`: the trainable part of the params after the last step.
        - `solver_state`: what that step returned.
        - `converged`: whether the tolerance was met.

        **Returns:**

        The answer, a vector like `params`; and why the tolerance was not met if it was
        not, one of `RESULTS`: `successful` for nothing but the limit on steps.
        """


class AbstractDirectSolver(AbstractSolver):
    """A solver that runs as a whole and whose path is not differentiated.

    Its answer satisfies an optimality, so that implicit differentiation applies.
    """

    @abc.abstractmethod
    def solve(
        self,
        problem: AbstractProblem,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key,
        model_state: ModelState,
    ) -> Outcome:
        """Solve the problem.

        **Arguments:**

        - `problem`, `hyper`: the inner problem and the outer variables.
        - `params`: where to start.
        - `batch`, `key`, `model_state`: what the problem is evaluated on.

        **Returns:**

        An [`metaopt.extend.Outcome`][], whose `result` says how it went. It never raises
        because of the numbers.
        """
