"""The inverse of gradient descent with momentum in integers: exact to the last bit."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._results import RESULTS
from ..._core._tree import nan_where, split_trainable, tree_dot
from ..._core._types import Hyper, ModelState, Vector
from .._exact_momentum import AbstractExactMomentum
from .._gauge import measured, new_gauge, rounding_variances, scaled_gauge
from .._loop import Loop
from ._cotangents import added, in_dtypes, or_zeros, partitioned, wide_zeros
from ._derivative import with_reverse_derivative
from ._run import AbstractRun, Inputs, Reached, Record, Undone


class MomentumRun(AbstractRun):
    """The steps of [`metaopt.ReversibleSGD`][]; the settings are its learning rates and
    momenta.

    **Attributes:**

    - `forward`: `forward(inputs)` is the record of all steps.
    - `evaluate`: `evaluate(params, others, draw)` are the loss, the auxiliary output and
        the gradient of one step.
    - `draws`: as in the loop.
    - `solver`: for its arithmetic; its schedules are in the inputs.
    """

    forward: Callable
    evaluate: Callable
    draws: Any
    solver: AbstractExactMomentum

    def __init__(
        self,
        solver: AbstractExactMomentum,
        loop: Loop,
        hyper: Hyper,
        model_state: ModelState,
        inputs: Inputs,
    ):
        static_hyper = split_trainable(hyper)[1]
        static_state = split_trainable(model_state)[1]

        def forward(inputs):
            # The same numbers in both directions: schedules are not evaluated again.
            known = solver.resolved(*inputs.settings)
            steps = eqx.tree_at(lambda loop: loop.solver, loop, known)
            floats, static = inputs.others, (static_hyper, static_state)
            full_hyper, full_state = eqx.combine(floats, static)
            start = eqx.combine(inputs.params, loop.static_params)
            state = steps.start(start, full_hyper, full_state)
            state = eqx.tree_at(
                lambda s: s.solver_state, state, known.recording(state.solver_state)
            )
            body = lambda state, draw: steps.step(full_hyper, state, draw)
            return Record(*jax.lax.scan(body, state, steps.draws, steps.num_steps))

        def evaluate(params, others, draw):
            full_hyper, full_state = eqx.combine(others, (static_hyper, static_state))
            full = eqx.combine(params, loop.static_params)
            batch, key = loop.drawn(draw)
            gradient, out = loop.problem.field(full, full_hyper, batch, key, full_state)
            return out.value, split_trainable(out.aux)[0], gradient

        first = jax.tree.map(lambda leaf: leaf[0], loop.draws)
        self.forward = eqx.filter_closure_convert(forward, inputs)
        self.evaluate = eqx.filter_closure_convert(
            evaluate, inputs.params, inputs.others, first
        )
        self.draws = loop.draws
        self.solver = solver.resolved(None, None)

    @property
    def failure(self):
        return RESULTS.inner_not_reversed

    def record(self, inputs):
        return self.forward(inputs)

    def differentiable(self, inputs, *, throw):
        return with_reverse_derivative(self, inputs, throw=throw)

    def undo(
        self, inputs: Inputs, record: Record, cotangent: Reached, moving: Any
    ) -> Undone:
        r"""The derivative of the run, which is undone during the reverse pass.

        With $x$ the params, $v$ the velocity, $\alpha$ the rate, $\gamma$ the momentum,
        and bars for derivatives of what is differentiated, a step
        $v' = \gamma v + \nabla L(x)$, $x' = x - \alpha v'$ is passed backwards by

        $$
        \bar w = \bar v' - \alpha \bar x', \qquad
        \bar v = \gamma \bar w, \qquad
        \bar x = \bar x' + \nabla^2 L(x) \bar w, \qquad
        \bar \alpha = - \bar x' \cdot v', \qquad
        \bar \gamma = \bar w \cdot v ,
        $$

        and what else the gradient depends on is pulled back along $\bar w$ with it. The
        position is undone before the gradient is known, because its change depends on
        $v'$ alone; the gradient then gives the velocity.

        The gradient is differentiated in reverse mode. A forward derivative along
        $\bar w$ of the whole gradient of $L$ takes as many products, 2.9 gradients in all
        for a network of six layers either way, and is right only where second derivatives
        are symmetric: not for a loss that holds a part of itself constant or has a custom
        derivative. Losses and auxiliary outputs get theirs from the same pullback.

        **Arguments:** as for any run.
        """
        solver, like = self.solver, inputs.params
        all_rates, all_momenta = inputs.settings
        final = record.state.solver_state
        held = self.evaluate, inputs.others
        wanted, fixed = partitioned(held, moving)
        first = jax.tree.map(lambda leaf: leaf[0], self.draws)
        _, aux, _ = jax.eval_shape(self.evaluate, like, inputs.others, first)
        in_last_aux = or_zeros(cotangent.aux, aux)
        in_losses = or_zeros(cotangent.losses, record.losses)
        numerators, bounds, stored_bits = solver.factors(all_momenta)
        of_end = added(wide_zeros(like), jax.tree.leaves(or_zeros(cotangent.params, like)))
        carry = (
            final.exact,
            of_end,
            wide_zeros(like),
            wide_zeros(wanted),
            scaled_gauge(of_end, new_gauge().dtype),
        )
        back = _StepBack(solver, like, final.words, wanted, fixed, in_last_aux)
        xs = self.draws, all_rates, all_momenta, numerators, bounds, in_losses
        (exact, in_params, _, sums, gauge), (in_rates, in_momenta) = jax.lax.scan(
            lambda carry, x: back(carry, x), carry, xs, reverse=True
        )
        begun, _ = solver.begin(like)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), exact, begun)
        returned = jnp.all(jnp.stack(jax.tree.leaves(same)))
        of_evaluate, of_others = in_dtypes(sums, wanted)
        of_inputs = Inputs(
            in_dtypes(in_params, like),
            of_others,
            (in_rates.astype(all_rates.dtype), in_momenta.astype(all_momenta.dtype)),
        )
        nothing = lambda leaf: nan_where(jnp.logical_not(returned), leaf)
        return Undone(
            jax.tree.map(nothing, (of_evaluate, of_inputs)),
            returned,
            returned_to_start=returned,
            stored_bits=stored_bits,
            measured=gauge,
        )


class _StepBack(eqx.Module):
    """One inverse step, for `jax.lax.scan`.

    **Attributes:**

    - `solver`, `like`, `words`: the arithmetic, a vector like the params, and the words
        that were taken off.
    - `wanted`, `fixed`: what a step reads, differentiated or not.
    - `in_last_aux`: the cotangent of the auxiliary output of the last step.
    """

    solver: AbstractExactMomentum
    like: Vector
    words: list[jax.Array]
    wanted: Any
    fixed: Any
    in_last_aux: Any

    def __call__(self, carry, x):
        solver, like = self.solver, self.like
        exact, in_point, in_velocity, sums, gauge = carry
        draw, rate, momentum, numerator, bound, in_loss = x
        velocity = solver.velocity_at(exact, like)
        variances = rounding_variances(solver.params_at(exact, like))
        gauge = measured(gauge, in_point, variances)
        exact = solver.position_before(exact, rate)
        point = solver.params_at(exact, like)

        def evaluate(point, wanted):
            evaluate, others = eqx.combine(wanted, self.fixed)
            return evaluate(point, others, draw)

        (_, _, gradient), pull = jax.vjp(evaluate, point, self.wanted)
        exact = solver.velocity_before(exact, self.words, gradient, numerator, bound)
        in_rate = -tree_dot(in_point, velocity)
        in_velocity = added(in_velocity, [-rate.astype(a.dtype) * a for a in in_point])
        in_momentum = tree_dot(in_velocity, solver.velocity_at(exact, like))
        is_last = draw[0] == solver.num_steps - 1
        in_aux = jax.tree.map(lambda a: jnp.where(is_last, a, 0), self.in_last_aux)
        more, into = pull((in_loss, in_aux, in_dtypes(in_velocity, gradient)))
        fraction = solver.fraction(numerator, momentum)
        carry = (
            exact,
            added(in_point, jax.tree.leaves(more)),
            [fraction.astype(a.dtype) * a for a in in_velocity],
            added(sums, jax.tree.leaves(into)),
            gauge,
        )
        return carry, (in_rate, in_momentum)
