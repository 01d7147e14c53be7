"""Truncated differentiation: reverse mode through the last steps only."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._detach import detached
from .._solver import AbstractIterativeSolver
from .._validate import check_count
from ._base import AbstractPathAdjoint, check_iterative


class TruncatedAdjoint(AbstractPathAdjoint):
    r"""Reverse mode through the last `num_steps` steps of the inner solver.

    Cheaper than [`metaopt.UnrolledAdjoint`][] in time and memory, and biased: what
    `hyper` did before is left out. On a strongly convex inner problem the bias shrinks
    as $(1 - \alpha \mu)^K$ (Shaban, Cheng, Hatch and Boots, 2019). The initial params
    are out of its reach.

    **Arguments:**

    - `num_steps`: how many steps are differentiated; at most those of the solver.
    """

    num_steps: int = eqx.field(static=True)
    sees_path: ClassVar[bool] = False

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")

    @property
    def left_out(self):
        return (f"all steps but the last {self.num_steps}",)

    def check(self, solver, data):
        check_iterative(self, solver)
        assert isinstance(solver, AbstractIterativeSolver)
        if self.num_steps > solver.num_steps:
            raise ValueError(
                f"`TruncatedAdjoint({self.num_steps})` differentiates more steps than "
                f"the solver takes, {solver.num_steps}."
            )
        if solver.stops_early:
            raise ValueError(
                "`TruncatedAdjoint` needs a fixed number of steps, and this solver may "
                "stop before. Drop the solver's tolerance, or use `OneStepAdjoint`."
            )

    def solve(self, inner, params, hyper, model_state, throw):
        loop = inner.loop(params)
        cut = loop.num_steps - self.num_steps

        def head(params, hyper, model_state):
            state = loop.start(params, hyper, model_state)
            return loop.run_primal(hyper, state, 0, cut)

        state, early = detached(head, params, hyper, model_state)
        draws = jax.tree.map(lambda leaf: leaf[cut:], loop.draws)
        body = lambda state, draw: loop.step(hyper, state, draw)
        state, late = jax.lax.scan(body, state, draws, self.num_steps)
        return loop.finish(state, jnp.concatenate([early, late]))
