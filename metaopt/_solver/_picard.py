"""Picard iteration: applying the step map again and again."""

import equinox as eqx
import jax
import jax.numpy as jnp

from .._model_state import AbstractStatePolicy
from .._problem import AbstractFixedPointProblem
from .._tree import split_trainable, tree_norm
from .._validate import check_count, check_tolerance
from ._base import AbstractIterativeSolver, StepOutput
from ._common import check_state_policy, check_stopping, problem_optimality


class Picard(AbstractIterativeSolver):
    """Solves a fixed-point problem by applying its step map again and again.

    Use it for contractions, and wherever the derivative should follow the path; it
    converges at the rate of the contraction. Where the map is no contraction it
    diverges or circles, which the result says.

    **Arguments:**

    - `num_steps`: the number of steps, and the most that are taken.
    - `rtol`, `atol`: stop once the Euclidean norm of `step(params) - params` is at most
        `atol + rtol * norm(params)`. With `rtol=None` all the steps are taken.
    - `relaxation`: the new params are `(1 - relaxation) * params + relaxation *
        step(params)`; in (0, 1], below 1 tames maps that overshoot.
    - `state_policy`: what becomes of model state, if the problem has any.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a fixed
    point.
    """

    num_steps: int = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    relaxation: float = eqx.field(static=True)
    state_policy: AbstractStatePolicy | None

    def __init__(
        self,
        num_steps: int = 100,
        *,
        rtol: float | None = 1e-6,
        atol: float = 0.0,
        relaxation: float = 1.0,
        state_policy: AbstractStatePolicy | None = None,
    ):
        self.num_steps = num_steps
        self.rtol = rtol
        self.atol = atol
        self.relaxation = relaxation
        self.state_policy = state_policy

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        check_tolerance(self.rtol, "rtol")
        check_tolerance(self.atol, "atol", optional=False)
        check_tolerance(self.relaxation, "relaxation", optional=False)
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"`relaxation` must lie in (0, 1]; got {self.relaxation!r}.")

    @property
    def stops_early(self):
        return self.rtol is not None

    def check(self, problem, data):
        if not isinstance(problem, AbstractFixedPointProblem):
            raise ValueError(
                f"`Picard` solves fixed-point problems, and `{type(problem).__name__}` "
                "is none. Use `metaopt.Descent` or `metaopt.OptimistixSolver`."
            )
        check_state_policy(self, problem)
        data.check(self.num_steps)
        check_stopping(self, data, "rtol")

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def init(self, problem, params, hyper):
        return None

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        out = problem.evaluate(params, hyper, batch, key, model_state)
        old, static = split_trainable(params)
        new = split_trainable(out.value)[0]
        difference = jax.tree.map(jnp.subtract, new, old)
        norm = tree_norm(jax.lax.stop_gradient(difference))
        converged = None
        if self.rtol is not None:
            bound = self.atol + self.rtol * tree_norm(jax.lax.stop_gradient(old))
            converged = norm <= bound
        if self.relaxation != 1:
            new = jax.tree.map(lambda a, d: a + self.relaxation * d, old, difference)
        output = StepOutput(
            monitor=norm, converged=converged, model_state=out.state, aux=out.aux
        )
        return eqx.combine(new, static), None, output
