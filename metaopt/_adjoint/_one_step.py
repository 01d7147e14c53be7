"""One-step differentiation: the derivative of the last step alone."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._tree import padding
from .._jaxpr._detach import detached
from .._report import inner_steps, Work
from .._solver import AbstractMixingSolver
from ._bias import Bias
from ._path import AbstractPathAdjoint, check_iterative, counted_anew
from ._reach import AbstractReach, AtSolution


class OneStepAdjoint(AbstractPathAdjoint):
    """The derivative of the last step of the inner solver alone (Bolte, Pauwels and
    Vaiter, 2023); for a fixed point, the Jacobian-free estimate (Fung et al., 2022).

    The cheapest of all, and biased: the error is about the rate of convergence of the
    solver, so it suits fast solvers and strong contractions. It keeps the direction
    more often than the length. The initial params are out of its reach.
    """

    reach: ClassVar[AbstractReach] = AtSolution()

    @property
    def bias(self):
        return Bias(("all steps but the last",))

    def check(self, solver, data):
        check_iterative(self, solver)
        if isinstance(solver, AbstractMixingSolver):
            raise ValueError(
                f"The last step of `{type(solver).__name__}` mixes the map with earlier "
                "steps, so that its derivative is not the one-step estimate. Use "
                "`metaopt.Picard()`, or `metaopt.ImplicitAdjoint(metaopt.Neumann(0))`, "
                "which is the same estimate after any solver."
            )

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps = inner_steps(columns)
        return Work(gradients=steps + 1, products=np.ones_like(steps))

    def solve(self, inner, params, hyper, model_state, throw):
        loop = inner.loop(params)
        last = loop.num_steps - 1

        def head(params, hyper, model_state):
            state = loop.start(params, hyper, model_state)
            return loop.run_primal(hyper, state, 0, last)

        state, early = detached(head, params, hyper, model_state)
        state = counted_anew(state, loop)
        # One more step is taken in any case, even where the loop had stopped.
        state = eqx.tree_at(lambda s: s.done, state, jnp.zeros_like(state.done))
        index = state.num_steps
        draw = jax.tree.map(lambda leaf: leaf[index], loop.draws)
        state, loss = loop.step(hyper, state, draw)
        unknown = jnp.full((), padding(), early.dtype)
        losses = jnp.append(early, unknown).at[index].set(loss)
        return loop.finish(state, losses)
