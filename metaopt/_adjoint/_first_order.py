"""First-order differentiation: the gradients of the inner loss are held constant."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .._core._tree import split_trainable, tree_sub
from .._jaxpr._detach import stop_gradient
from .._problem import AbstractProblem, AbstractWrappedProblem, Evaluation, returned
from .._report import inner_steps, Work
from ._bias import Bias
from ._path import AbstractPathAdjoint, check_iterative
from ._reach import AbstractReach, InnerGradientsHeld


class FirstOrderAdjoint(AbstractPathAdjoint):
    """Reverse mode through every step, with the gradients of the inner loss held constant.

    The derivative in the initial params is then as cheap as one gradient, whatever the
    number of steps, and that in settings of the solver (learning rates) is their effect
    on the steps as they were taken. For few-shot learning this is first-order MAML (Finn,
    Abbeel and Levine, 2017). Biased; and `hyper` that acts through the inner loss alone is
    out of its reach.
    """

    reach: ClassVar[AbstractReach] = InnerGradientsHeld()

    @property
    def bias(self):
        return Bias(("how the inner gradients change",))

    def check(self, solver, data):
        check_iterative(self, solver)

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps = inner_steps(columns)
        return Work(gradients=steps + 1, products=np.zeros_like(steps))

    def solve(self, inner, params, hyper, model_state, throw):
        if not inner.problem.has_loss:
            raise ValueError(
                "`FirstOrderAdjoint` holds the gradients of an inner loss constant, and a "
                f"`{type(inner.problem).__name__}` has none. Use "
                "`metaopt.OneStepAdjoint()`."
            )
        held = dataclasses.replace(inner, problem=_HeldGradients(inner.problem))
        outcome = held.loop(params).run(params, hyper, model_state)
        return outcome


class _HeldGradients(AbstractWrappedProblem):
    """A problem whose loss is, for derivatives, linear in the params and nothing else.

    Its gradient is that of the loss, held constant; model state and auxiliary output
    are differentiable as they were.
    """

    problem: AbstractProblem

    def init(self, hyper, key):
        return self.problem.init(hyper, key)

    def loss(self, params, hyper, batch, *, key, state=None):
        trainable = split_trainable(params)[0]
        gradient, out = self.problem.field(params, hyper, batch, key, state)
        value, gradient = stop_gradient((out.value, gradient))
        change = tree_sub(trainable, stop_gradient(trainable))  # of value zero
        slopes = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, change)
        linear = sum(jax.tree.leaves(slopes), jnp.zeros_like(value))
        value += linear.astype(value.dtype)
        return returned(self, Evaluation(value, out.state, out.aux))
