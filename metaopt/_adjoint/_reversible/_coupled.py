r"""The way back of coupled Picard iteration: to rounding, which it magnifies.

What to expect of it. Where the map has the Jacobian $J$, a change of $(y, z)$ passes a
step as

$$
\delta y' = (1 - \beta) \delta y + \beta J \delta z, \qquad
\delta z' = (1 - \beta) \delta z + \beta J \delta y' .
$$

For an eigenvalue $\lambda$ of $J$ that is a matrix of size two, whose eigenvalues have the
product $(1 - \beta)^2$. Those of a contraction are at most 1, so that the smaller one is
between $(1 - \beta)^2$, where $\lambda = \pm 1$, and $1 - \beta$, where $\lambda = 0$.
Undoing the step divides an error by it. What was rounded in the last of $n$ steps, an eps
of the numbers, arrives at the start as $(1 - \beta)^{-2 n}$ eps at most, and what was
rounded before that as less. With the defaults of `ReversiblePicard`, a relaxation of a
half and six steps, this is 4096 units of rounding, 2.4e-4 in float32. (Measured, for maps
of norm 0.9: 1e-5 to 6e-5.) Where the map is no contraction, it can be more.

The derivative suffers less. The states that are furthest off are the first ones, and for a
contraction what is pulled back has become small by then. (Measured there: a twentieth of
the drift, or less. At a norm of 2: a third to a half.)
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._results import RESULTS
from ..._solver import InnerSolve, ReversiblePicard
from ..._tree import split_trainable
from ..._types import Hyper, ModelState, Params
from ._cotangents import added, in_dtypes, or_zeros, wide_zeros
from ._lanes import (
    beside_arrays,
    expanded,
    Level,
    Levels,
    nan_unless,
    over,
    summed_where_shared,
)
from ._run import AbstractRun, Inputs, Reached, Record, Undone


class CoupledRun(AbstractRun):
    """The steps of [`metaopt.ReversiblePicard`][], which has no settings.

    **Attributes:**

    - `forward`: `forward(inputs)` is the record of all steps of one example.
    - `evaluate`: `evaluate(params, others, draw)` are the map and its auxiliary output,
        for one example.
    - `draws`: as in the loop.
    - `solver`: for its arithmetic.
    - `max_drift`: the largest relative distance from the start that will do.
    - `levels`: which arrays have an axis of examples.
    """

    forward: Callable
    evaluate: Callable
    draws: Any
    solver: ReversiblePicard
    max_drift: float = eqx.field(static=True)
    levels: Levels

    @classmethod
    def of(
        cls,
        inner: InnerSolve,
        params: Params,
        hyper: Hyper,
        model_state: ModelState,
        inputs: Inputs,
        max_drift: float,
    ) -> "CoupledRun":
        """That of one solve."""
        loop = inner.loop(params)
        solver = loop.solver
        assert isinstance(solver, ReversiblePicard)
        static = split_trainable((hyper, model_state))[1]

        def forward(inputs):
            full_hyper, full_state = eqx.combine(inputs.others, static)
            start = eqx.combine(inputs.params, loop.static_params)
            state = loop.start(start, full_hyper, full_state)
            return Record(*loop.run_primal(full_hyper, state, 0, loop.num_steps))

        def evaluate(params, others, draw):
            full_hyper, full_state = eqx.combine(others, static)
            full = eqx.combine(params, loop.static_params)
            batch, key = loop.drawn(draw)
            out = loop.problem.evaluate(full, full_hyper, batch, key, full_state)
            return split_trainable(out.value)[0], split_trainable(out.aux)[0]

        first = jax.tree.map(lambda leaf: leaf[0], loop.draws)
        return cls(
            forward=eqx.filter_closure_convert(forward, inputs),
            evaluate=eqx.filter_closure_convert(
                evaluate, inputs.params, inputs.others, first
            ),
            draws=loop.draws,
            solver=solver,
            max_drift=max_drift,
            levels=(),
        )

    @property
    def failure(self):
        return RESULTS.inner_drifted

    def record(self, inputs):
        call = lambda forward, params, others: forward(Inputs(params, others, ()))
        axes = lambda level: level.forward + level.params + level.others
        parts = self.forward, inputs.params, inputs.others
        # Constants come out of a program as numbers, which are no arrays to Equinox.
        return jax.tree.map(jnp.asarray, over(self.levels, axes, call, *parts))

    def undo(
        self, inputs: Inputs, record: Record, cotangent: Reached, moving: Any
    ) -> Undone:
        r"""The derivative of the run, which is undone on the way.

        With bars for derivatives of what is differentiated, the second half of a step,
        $z' = (1 - \beta) z + \beta f(y')$, is passed backwards by

        $$
        z = \frac{z' - \beta f(y')}{1 - \beta}, \qquad
        \bar y' \mathrel{+}= \beta J(y')^T \bar z', \qquad
        \bar z = (1 - \beta) \bar z' ,
        $$

        and its first half likewise, with $y$ and $z$ in each other's place. The product
        with the transposed Jacobian comes with the value of the map: each half takes one
        evaluation, and one pullback. What else the map depends on is pulled back with it.

        **Arguments:** as for any run.
        """
        solver, levels = self.solver, self.levels
        beta = solver.relaxation
        held = self.evaluate, inputs.others
        wanted, fixed = eqx.partition(held, moving)
        wanted, rest = eqx.partition(wanted, eqx.is_inexact_array)
        fixed = eqx.combine(fixed, rest)
        steps = record.state.num_steps  # of each example
        ends = record.state.solver_state.companion, record.state.params

        def evaluate(at, wanted, draw):
            evaluate, others = eqx.combine(wanted, fixed)
            call = lambda evaluate, others, draw, at: evaluate(at, others, draw)
            axes = lambda level: level.evaluate + level.others
            return over(levels, axes, call, evaluate, others, draw, at)

        def halfway(draw, new, at, in_new, in_at, in_aux, sums, runs):
            """Undoes `new = (1 - beta) * old + beta * map(at)`."""
            (value, _), pull = jax.vjp(
                lambda at, held: evaluate(at, held, draw), at, wanted
            )
            # What has been undone already stays as it is, and adds nothing to the sums.
            where = lambda a, b: jnp.where(expanded(runs, a.ndim), a, b)
            in_value = in_dtypes([where(beta * a, 0) for a in in_new], value)
            more, into = pull((in_value, in_aux))
            old = jax.tree.map(where, solver.unmixed(new, value), new)
            in_old = [where((1 - beta) * a, a) for a in in_new]
            in_at = added(in_at, jax.tree.leaves(more))
            return old, in_old, in_at, added(sums, jax.tree.leaves(into))

        def back(count, carry):
            (y, z), (in_y, in_z), sums = carry
            draw = self._draw(jnp.maximum(steps - 1 - count, 0))
            # Auxiliary output is that of the first evaluation in the last step.
            in_aux = jax.tree.map(lambda a: jnp.where(count == 0, a, 0), in_last_aux)
            runs = count < steps
            z, in_z, in_y, sums = halfway(draw, z, y, in_z, in_y, no_aux, sums, runs)
            y, in_y, in_z, sums = halfway(draw, y, z, in_y, in_z, in_aux, sums, runs)
            return (y, z), (in_y, in_z), sums

        draw = self._draw(jnp.zeros_like(steps))
        _, aux = jax.eval_shape(evaluate, ends[0], wanted, draw)
        no_aux, in_last_aux = or_zeros(None, aux), or_zeros(cotangent.aux, aux)
        in_params = jax.tree.leaves(or_zeros(cotangent.params, ends[0]))
        cotangents = wide_zeros(ends[0]), added(wide_zeros(ends[0]), in_params)
        # Known before the loop runs, where it does not stop early.
        most = jnp.max(steps) if solver.stops_early else solver.num_steps
        found, (in_y, in_z), sums = jax.lax.fori_loop(
            0, most, back, (ends, cotangents, wide_zeros(wanted))
        )

        of_start = lambda level: level.params
        drift = over(levels, of_start, solver.drift, inputs.params, ends, found)
        # Both iterates began at the initial params.
        axes = [level.params for level in levels]
        into_params = jax.tree.unflatten(jax.tree.structure(ends[0]), added(in_y, in_z))
        into_params = summed_where_shared(levels, axes, into_params)
        succeeded = drift <= self.max_drift
        of_params = nan_unless(succeeded, levels, axes, into_params)
        of_params = in_dtypes(jax.tree.leaves(of_params), inputs.params)
        sought = [leaf is not None for leaf in beside_arrays(wanted, held)]
        axes = [level.evaluate + level.others for level in levels]
        axes = [tuple(itertools.compress(of_level, sought)) for of_level in axes]
        sums = nan_unless(succeeded, levels, axes, sums)
        of_evaluate, of_others = in_dtypes(sums, wanted)
        cotangents = of_evaluate, Inputs(of_params, of_others, ())
        return Undone(cotangents, succeeded, drift=drift)

    def for_examples(
        self, inputs: Inputs, axes: tuple["CoupledRun", Inputs], axis_name: Any
    ) -> "CoupledRun":
        """A run, some of whose arrays have got an axis of examples, as the run of all.

        **Arguments:**

        - `inputs`: what it starts from.
        - `axes`: like the run and the inputs, with 0 for an array with such an axis, and
            `None` for what all examples share.
        - `axis_name`: the name of the axis.
        """
        of_run, of_inputs = axes
        pairs = {
            "forward": (of_run.forward, self.forward),
            "evaluate": (of_run.evaluate, self.evaluate),
            "draws": (of_run.draws, self.draws),
            "params": (of_inputs.params, inputs.params),
            "others": (of_inputs.others, inputs.others),
        }
        parts = {name: tuple(beside_arrays(*pair)) for name, pair in pairs.items()}
        level = Level(**parts, axis_name=axis_name)
        return dataclasses.replace(self, levels=(*self.levels, level))

    def _draw(self, index: jax.Array) -> Any:
        """The draws of one step for each example."""
        pick = lambda draws, i: jax.tree.map(lambda leaf: leaf[i], draws)
        return over(self.levels, lambda level: level.draws, pick, self.draws, index)
