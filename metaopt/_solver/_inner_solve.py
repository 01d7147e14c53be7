"""One inner solve as a value: everything but `hyper` and the start is fixed."""

import dataclasses

import equinox as eqx
import jax

from .._data import AbstractData
from .._detach import detached
from .._problem import AbstractInnerProblem, AbstractProblem
from .._tree import tree_scaled_norm, tree_widened
from .._types import Batch, FloatScalar, Hyper, Key, ModelState, Params
from ._base import (
    AbstractDirectSolver,
    AbstractIterativeSolver,
    AbstractSolver,
    Optimality,
    Outcome,
)
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
    """

    problem: AbstractProblem
    solver: AbstractSolver
    data: AbstractData
    key: Key
    tolerance: FloatScalar | None = None

    def loop(self, params: Params) -> Loop:
        """The steps of the solve. Needs an iterative solver."""
        assert isinstance(self.solver, AbstractIterativeSolver)  # checked by adjoints
        return Loop(self.problem, self.solver, self.data, params, self.key)

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
            outcome = loop.finish(state, losses)
            return dataclasses.replace(outcome, solver_state=state.solver_state)

        return detached(solve, params, hyper, model_state)

    def optimality(self, outcome: Outcome, hyper: Hyper) -> Optimality:
        """The condition that the solution satisfies, on all of the data.

        A loss that takes a key is given one and the same here at every call: a frozen
        draw of its randomness. Data of half precision are in float32 here, as are the
        params that an adjoint evaluates the condition at.
        """
        return self.solver.optimality(
            self.problem,
            outcome.params,
            hyper,
            tree_widened(self.data.full()),
            self.key,
            tree_widened(jax.lax.stop_gradient(outcome.model_state)),
        )

    def last_loss(self, outcome: Outcome, hyper: Hyper) -> FloatScalar | None:
        """The inner loss at the solution, on the batch of the last step; `None` where the
        problem has none."""
        problem = self.problem
        if not isinstance(problem, AbstractInnerProblem):
            return None
        batch, key = self._last_draw(outcome)

        def loss(outcome, hyper):
            state = outcome.model_state
            return problem.evaluate(outcome.params, hyper, batch, key, state).value

        return detached(loss, outcome, hyper)

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
