"""One inner solve as a value: everything but `hyper` and the start is fixed."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import tree_scaled_norm, tree_widened
from .._core._types import Batch, FloatScalar, Hyper, Key, ModelState, Params
from .._data import AbstractData
from .._jaxpr._detach import detached
from .._problem import AbstractProblem
from ._base import (
    AbstractDirectSolver,
    AbstractIterativeSolver,
    AbstractSolver,
    Optimality,
    Outcome,
)
from ._earlier import Earlier
from ._loop import Loop


class InnerSolve(eqx.Module):
    """One inner solve: a problem, the solver for it, its data and its randomness.

    Adjoints receive one of these and choose how the derivative passes through it.

    **Attributes:**

    - `problem`: the inner problem.
    - `solver`: how it is solved.
    - `data`: where its batches come from.
    - `key`: for everything random in the solve.
    - `tolerance`: the relative accuracy that will do for an implicit derivative. It
        loosens what the adjoint and its linear solver ask for and never tightens it;
        `None` leaves them alone.
    - `gauge`: an array whose cotangent says how the derivative grew along the path of a
        solver by steps; `None` where nobody asks.
    - `earlier`: the state of an earlier solve, which the solver goes on from; `None`
        begins anew.
    """

    problem: AbstractProblem
    solver: AbstractSolver
    data: AbstractData
    key: Key
    tolerance: FloatScalar | None = None
    gauge: jax.Array | None = None
    earlier: Earlier | None = None

    def loop(self, params: Params) -> Loop:
        """The steps of the solve. Needs an iterative solver."""
        assert isinstance(self.solver, AbstractIterativeSolver)  # checked by adjoints
        return Loop(
            self.problem,
            self.solver,
            self.data,
            params,
            self.key,
            gauge=self.gauge,
            earlier=self.earlier,
        )

    def primal(self, params: Params, hyper: Hyper, model_state: ModelState) -> Outcome:
        """The solution, held constant for derivatives."""

        def solve(params, hyper, model_state):
            if isinstance(self.solver, AbstractDirectSolver):
                batch = self.data.full()
                return self.solver.solve(
                    self.problem, params, hyper, batch, self.key, model_state
                )
            loop = self.loop(params)
            state = loop.start(params, hyper, model_state)
            state, losses = loop.run_primal(hyper, state, 0, loop.num_steps)
            return loop.finish(state, losses)

        return self.checked(detached(solve, params, hyper, model_state), hyper)

    def optimality(self, outcome: Outcome, hyper: Hyper, widen: bool = False) -> Optimality:
        """The condition that the solution satisfies, on all of the data.

        A loss that takes a key is given one and the same here at every call: a frozen
        draw of its randomness. `widen` is for params in float32: arrays of half precision
        are in float32 as well.
        """
        widened = tree_widened if widen else lambda tree: tree
        return self.solver.optimality(
            self.problem,
            outcome.params,
            hyper,
            widened(self.data.full()),
            self.key,
            widened(jax.lax.stop_gradient(outcome.model_state)),
        )

    def checked(self, outcome: Outcome, hyper: Hyper) -> Outcome:
        """The outcome with the inner loss at the solution, failed where that is not finite:
        gradients, which steps look at, can be finite where the loss is not."""
        problem = self.problem
        if outcome.loss is not None or not problem.has_loss:
            return outcome
        batch, key = self._last_draw(outcome)

        def evaluate(outcome, hyper):
            state = outcome.model_state
            return problem.evaluate(outcome.params, hyper, batch, key, state).value

        loss = detached(evaluate, outcome, hyper)
        lost = jnp.logical_not(jnp.isfinite(loss))
        only_loss = lost & (outcome.failed_step < 0)
        return dataclasses.replace(
            outcome,
            loss=loss,
            result=first_failure(
                outcome.result, mask_result(lost, RESULTS.inner_nonfinite)
            ),
            failed_step=jnp.where(only_loss, outcome.num_steps, outcome.failed_step),
        )

    def last_residual(self, outcome: Outcome, hyper: Hyper) -> FloatScalar:
        """The norm of the optimality at the solution, on the batch of the last step."""
        batch, key = self._last_draw(outcome)

        def residual(outcome, hyper):
            condition = self.solver.optimality(
                self.problem, outcome.params, hyper, batch, key, outcome.model_state
            )
            variables = eqx.filter((outcome.params, hyper), eqx.is_inexact_array)
            return tree_scaled_norm(condition(*variables))

        return detached(residual, outcome, hyper)

    def _last_draw(self, outcome: Outcome) -> tuple[Batch, Key]:
        if isinstance(self.solver, AbstractIterativeSolver):
            return self.loop(outcome.params).last_draw()
        return self.data.full(), self.key
