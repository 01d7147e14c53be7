"""Picard iteration: applying the step map again and again."""

from typing import Any

import equinox as eqx
import jax

from .._model_state import AbstractStatePolicy
from .._types import IntScalar
from .._validate import check_count, check_tolerance
from ._examples import Examples
from ._fixed_point import AbstractFixedPointSolver, as_budget, Begun, check_relaxation


class Picard(AbstractFixedPointSolver):
    """Solves a fixed-point problem by applying its step map again and again.

    Use it for contractions, and wherever the derivative should follow the path; it
    converges at the rate of the contraction. Where the map is no contraction it
    diverges or circles, which the result says. What is returned is the map, applied to the
    first params that meet the tolerance: for a contraction that is nearer still.

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

    num_steps: int = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    relaxation: float = eqx.field(static=True)
    per_example: bool = eqx.field(static=True)
    budget: IntScalar | None
    state_policy: AbstractStatePolicy | None

    def __init__(
        self,
        num_steps: int = 100,
        *,
        rtol: float | None = 1e-6,
        atol: float = 0.0,
        relaxation: float = 1.0,
        per_example: bool = False,
        budget: Any = None,
        state_policy: AbstractStatePolicy | None = None,
    ):
        self.num_steps = num_steps
        self.rtol = rtol
        self.atol = atol
        self.relaxation = relaxation
        self.per_example = per_example
        self.budget = as_budget(budget)
        self.state_policy = state_policy

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        check_tolerance(self.rtol, "rtol")
        check_tolerance(self.atol, "atol", optional=False)
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
