"""Picard iteration: applying the step map again and again."""

import equinox as eqx
import jax

from .._core._types import IntScalar
from .._problem import AbstractStatePolicy
from ._examples import Examples
from ._fixed_point import AbstractSingleMapSolver, as_budget, Begun, check_relaxation


class Picard(AbstractSingleMapSolver):
    """Solves a fixed-point problem by applying its step map again and again.

    Use it for contractions, and wherever the derivative should follow the path; it
    converges at the rate of the contraction. If the map is no contraction it diverges or
    circles, which the result says. It returns the map applied to the first params that meet
    the tolerance: for a contraction that is nearer still.

    **Arguments:**

    - `num_steps`: the number of steps, and the most that are taken.
    - `rtol`, `atol`: stop once the Euclidean norm of `step(params) - params` is at most
        `atol + rtol * norm(params)`. With `rtol=None` all the steps are taken.
    - `relaxation`: the new params are `(1 - relaxation) * params + relaxation *
        step(params)`; in (0, 1], below 1 tames maps that overshoot.
    - `per_example`: whether the leading axis of every array of the params is one of
        examples, each of which has to meet the tolerance. Under `jax.vmap` it is so
        without.
    - `budget`: the most steps that are taken in this call, at most `num_steps`: an integer
        array, which can change without compiling again.
    - `state_policy`: what becomes of model state, if the problem has any.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a fixed
    point.
    """

    num_steps: int = eqx.field(default=100, static=True)
    rtol: float | None = eqx.field(default=1e-6, kw_only=True, static=True)
    atol: float = eqx.field(default=0.0, kw_only=True, static=True)
    relaxation: float = eqx.field(default=1.0, kw_only=True, static=True)
    per_example: bool = eqx.field(default=False, kw_only=True, static=True)
    budget: IntScalar | None = eqx.field(default=None, converter=as_budget, kw_only=True)
    state_policy: AbstractStatePolicy | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_relaxation(self.relaxation)

    def init(self, problem, params, hyper):
        return Begun.at_start(params, Examples.of(params, self.per_example))

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        at, output, begun = self.applied(
            problem, params, hyper, batch, key, model_state, solver_state
        )
        new = at.value
        if self.relaxation != 1:
            new = jax.tree.map(lambda z, g: z + self.relaxation * g, at.params, at.residual)
        static = eqx.filter(params, eqx.is_inexact_array, inverse=True)
        return eqx.combine(new, static), begun, output
