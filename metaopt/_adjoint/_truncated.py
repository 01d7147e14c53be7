"""Truncated differentiation: reverse mode through the last steps only."""

import functools as ft
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._types import FloatScalar, Hyper
from .._core._validate import check_count, check_tolerance
from .._implicit import Constant, constant
from .._jaxpr._detach import detached
from .._report import inner_steps, Work
from .._solver import AbstractIterativeSolver
from ._bias import Bias
from ._memory import AbstractMemoryPlan, StoreAll
from ._path import AbstractPathAdjoint, check_iterative, counted_anew
from ._reach import AbstractReach, AtSolution


class TruncationBound(eqx.Module):
    r"""Bounds the bias of a truncated hypergradient, from how fast the solver converges.

    If each step brings any two params nearer by a factor $\rho < 1$, and the derivative
    of a step in `hyper` is at most $J$, then leaving out all steps but the last $K$ changes
    the hypergradient by at most $\rho^K J \|\partial_p F\| / (1 - \rho)$. For gradient
    descent at rate $\alpha$ on a loss of curvature $\mu$ to $1 / \alpha$,
    $\rho = 1 - \alpha \mu$ and $J = \alpha \|\partial_h \nabla_p L\|$ (Shaban et al.,
    2019). As right as these numbers are, along the whole path.

    **Arguments:** each is a number, or a function of `hyper`.

    - `contraction`: $\rho$.
    - `sensitivity`: $J$, a bound on the norm of the derivative of one step in `hyper`.
    """

    contraction: Constant
    sensitivity: Constant

    def __check_init__(self):
        for name, value in vars(self).items():
            if not (callable(value) or eqx.is_array(value)):
                check_tolerance(value, name, optional=False)
        if isinstance(self.contraction, (int, float)) and self.contraction >= 1:
            raise ValueError(
                f"`contraction` must be below 1; got {self.contraction}. Where steps do "
                "not contract there is no bound."
            )

    def __call__(
        self, hyper: Hyper, outer_slope: FloatScalar, num_steps: int
    ) -> FloatScalar:
        r"""The bound.

        **Arguments:**

        - `hyper`: the outer variables.
        - `outer_slope`: $\|\partial_p F\|$.
        - `num_steps`: $K$.
        """
        rho = jnp.asarray(constant(self.contraction, hyper), outer_slope.dtype)
        bound = rho**num_steps / (1 - rho) * constant(self.sensitivity, hyper)
        return jnp.where(rho < 1, bound * outer_slope, jnp.inf)


class TruncatedAdjoint(AbstractPathAdjoint):
    r"""Reverse mode through the last `num_steps` steps of the inner solver.

    Cheaper than [`metaopt.UnrolledAdjoint`][] in time and memory, and biased: what
    `hyper` did before is left out. On a strongly convex inner problem the bias shrinks
    as $(1 - \alpha \mu)^K$ (Shaban, Cheng, Hatch and Boots, 2019). The initial params
    are out of its reach.

    **Arguments:**

    - `num_steps`: how many steps are differentiated; at most those of the solver.
    - `memory`: what is kept of them, a plan as for [`metaopt.UnrolledAdjoint`][].
    - `bound`: numbers from which the report bounds the bias, a
        [`metaopt.accuracy.TruncationBound`][], where they are known.
    """

    num_steps: int = eqx.field(static=True)
    memory: AbstractMemoryPlan = StoreAll()
    bound: TruncationBound | None = None
    reach: ClassVar[AbstractReach] = AtSolution()

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        if not isinstance(self.memory, AbstractMemoryPlan):
            raise ValueError(
                "`memory` must be a memory plan such as `metaopt.memory.RecomputeSteps()`; "
                f"got {self.memory!r}."
            )
        if not isinstance(self.bound, TruncationBound | None):
            raise ValueError(
                "`bound` must be a `metaopt.accuracy.TruncationBound` or `None`; got "
                f"{self.bound!r}."
            )

    @property
    def bias(self):
        bound = self.bound
        if bound is not None:
            bound = ft.partial(bound, num_steps=self.num_steps)
        return Bias((f"all steps but the last {self.num_steps}",), bound)

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
                "stop before. Drop the tolerance, or use `metaopt.OneStepAdjoint`."
            )

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps = inner_steps(columns)
        last = np.minimum(steps, self.num_steps)
        gradients = steps + self.memory.num_repeats * last + 1
        return Work(gradients=gradients, products=last)

    def solve(self, inner, params, hyper, model_state, throw):
        loop = self.memory.prepare(inner.loop(params))
        cut = loop.num_steps - self.num_steps

        def head(params, hyper, model_state):
            state = loop.start(params, hyper, model_state)
            return loop.run_primal(hyper, state, 0, cut)

        state, early = detached(head, params, hyper, model_state)
        state = counted_anew(state, loop)
        draws = jax.tree.map(lambda leaf: leaf[cut:], loop.draws)
        body = lambda state, draw: loop.step(hyper, state, draw)
        state, late = self.memory.scan(body, state, draws, self.num_steps)
        return loop.finish(state, jnp.concatenate([early, late]))
