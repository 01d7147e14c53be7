r"""The inverse of coupled Picard iteration: exact but for rounding, which it magnifies.

Error analysis. For a map with the Jacobian $J$, a change of $(y, z)$ passes a step as

$$
\delta y' = (1 - \beta) \delta y + \beta J \delta z, \qquad
\delta z' = (1 - \beta) \delta z + \beta J \delta y' .
$$

For an eigenvalue $\lambda$ of $J$ that is a matrix of size two, whose eigenvalues have the
product $(1 - \beta)^2$. Those of a contraction are at most 1, so that the smaller one is
between $(1 - \beta)^2$, where $\lambda = \pm 1$, and $1 - \beta$, where $\lambda = 0$.
Undoing the step divides an error by it. The rounding of the last of $n$ steps, an eps of
the numbers, arrives at the start as $(1 - \beta)^{-2 n}$ eps at most, and that of earlier
steps as less. With the defaults of `ReversiblePicard`, a relaxation of a half and six
steps, this is 4096 units of rounding, 2.4e-4 in float32. (Measured, for maps of norm 0.9:
1e-5 to 6e-5.) Where the map is no contraction, it can be more.

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

from ..._core._results import RESULTS
from ..._core._tree import split_trainable
from ..._core._types import BoolScalar, Hyper, ModelState, Vector
from ..._jaxpr._detach import unknown_derivative
from .._loop import Loop
from ._cotangents import added, in_dtypes, or_zeros, partitioned, wide_zeros
from ._coupling import Coupling
from ._lanes import (
    beside_arrays,
    expanded,
    Level,
    Levels,
    nan_unless,
    over,
    summed_where_shared,
)
from ._run import AbstractSharedRun, Inputs, Reached, Record, Undone
from ._shared import with_shared_derivative


class CoupledRun(AbstractSharedRun):
    """The steps of [`metaopt.ReversiblePicard`][], which has no settings.

    **Attributes:**

    - `forward`: `forward(inputs)` is the record of all steps of one example.
    - `evaluate`: `evaluate(params, others, draw)` are the map and its auxiliary output,
        for one example.
    - `draws`: as in the loop.
    - `coupling`: the arithmetic of a step.
    - `num_steps`, `stops_early`: those of the solver.
    - `max_drift`: the largest relative distance from the start that is accepted.
    - `levels`: which arrays have an axis of examples.
    """

    forward: Callable
    evaluate: Callable
    draws: Any
    coupling: Coupling
    num_steps: int = eqx.field(static=True)
    stops_early: bool = eqx.field(static=True)
    max_drift: float = eqx.field(static=True)
    levels: Levels

    @classmethod
    def of(
        cls,
        loop: Loop,
        coupling: Coupling,
        hyper: Hyper,
        model_state: ModelState,
        inputs: Inputs,
        max_drift: float,
    ) -> "CoupledRun":
        """The run of one solve."""
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
            coupling=coupling,
            num_steps=loop.num_steps,
            stops_early=loop.solver.stops_early,
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

    def differentiable(self, inputs, *, throw):
        reached, rest = with_shared_derivative(self, inputs, throw)
        # Norms of residuals, which solvers of fixed points hold constant: their derivative
        # is not known, and no zero is the answer.
        of = jax.tree.leaves(split_trainable((self.evaluate, inputs))[0])
        losses = unknown_derivative(reached.losses, of, message=_LOSSES, throw=throw)
        return eqx.tree_at(lambda r: r.losses, reached, losses), rest

    def undo(
        self, inputs: Inputs, record: Record, cotangent: Reached, moving: Any
    ) -> Undone:
        r"""The derivative of the run, which is undone during the reverse pass.

        With bars for derivatives of what is differentiated, the second half of a step,
        $z' = (1 - \beta) z + \beta f(y')$, is passed backwards by

        $$
        z = \frac{z' - \beta f(y')}{1 - \beta}, \qquad
        \bar y' \mathrel{+}= \beta J(y')^T \bar z', \qquad
        \bar z = (1 - \beta) \bar z' ,
        $$

        and its first half likewise, with $y$ and $z$ in each other's place. The product
        with the transposed Jacobian comes with the value of the map: each half takes one
        evaluation, and one pullback. All other inputs of the map are pulled back with it.

        **Arguments:** as for any run.
        """
        levels = self.levels
        held = self.evaluate, inputs.others
        wanted, fixed = partitioned(held, moving)
        state = record.state
        steps = state.num_steps  # of each example
        ends = state.solver_state.companion, state.params
        half = _HalfBack(self, wanted, fixed)
        draw = self._draw(jnp.zeros_like(steps))
        _, aux = jax.eval_shape(lambda *args: half.evaluate(*args), ends[0], wanted, draw)
        no_aux, in_last_aux = or_zeros(None, aux), or_zeros(cotangent.aux, aux)

        def back(count, carry):
            (y, z), (in_y, in_z), sums = carry
            draw = self._draw(jnp.maximum(steps - 1 - count, 0))
            # Auxiliary output is that of the first evaluation in the last step.
            in_aux = jax.tree.map(lambda a: jnp.where(count == 0, a, 0), in_last_aux)
            runs = count < steps
            z, in_z, in_y, sums = half(draw, z, y, in_z, in_y, no_aux, sums, runs)
            y, in_y, in_z, sums = half(draw, y, z, in_y, in_z, in_aux, sums, runs)
            return (y, z), (in_y, in_z), sums

        in_params = jax.tree.leaves(or_zeros(cotangent.params, ends[0]))
        cotangents = wide_zeros(ends[0]), added(wide_zeros(ends[0]), in_params)
        # Known before the loop runs, where it does not stop early.
        most = jnp.max(steps) if self.stops_early else self.num_steps
        found, (in_y, in_z), sums = jax.lax.fori_loop(
            0, most, back, (ends, cotangents, wide_zeros(wanted))
        )
        of_start = lambda level: level.params
        drift = over(levels, of_start, self.coupling.drift, inputs.params, ends, found)
        # Both iterates began at the initial params.
        into_params = jax.tree.unflatten(jax.tree.structure(ends[0]), added(in_y, in_z))
        succeeded = drift <= self.max_drift
        of_params = self._of_params(inputs, succeeded, into_params)
        of_evaluate, of_others = self._of_held(held, wanted, succeeded, sums)
        cotangents = of_evaluate, Inputs(of_params, of_others, ())
        return Undone(cotangents, succeeded, drift=drift)

    def _of_params(self, inputs: Inputs, succeeded: BoolScalar, into: Vector) -> Vector:
        """The cotangent of the initial params, NaN where an example has failed."""
        levels = self.levels
        axes = [level.params for level in levels]
        into = summed_where_shared(levels, axes, into)
        into = nan_unless(succeeded, levels, axes, into)
        return in_dtypes(jax.tree.leaves(into), inputs.params)

    def _of_held(
        self, held: Any, wanted: Any, succeeded: BoolScalar, sums: list[jax.Array]
    ) -> Any:
        """The cotangents of the arrays that a step reads, NaN where an example that they
        belong to has failed."""
        sought = [leaf is not None for leaf in beside_arrays(wanted, held)]
        axes = [level.evaluate + level.others for level in self.levels]
        axes = [tuple(itertools.compress(of_level, sought)) for of_level in axes]
        return in_dtypes(nan_unless(succeeded, self.levels, axes, sums), wanted)

    def for_examples(self, inputs, axes, axis_name):
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


class _HalfBack(eqx.Module):
    """One half of an inverse step.

    **Attributes:**

    - `run`: the run.
    - `wanted`, `fixed`: what a step reads, differentiated or not.
    """

    run: CoupledRun
    wanted: Any
    fixed: Any

    def evaluate(self, at: Vector, wanted: Any, draw: Any) -> Any:
        """The map and its auxiliary output."""
        evaluate, others = eqx.combine(wanted, self.fixed)
        call = lambda evaluate, others, draw, at: evaluate(at, others, draw)
        axes = lambda level: level.evaluate + level.others
        return over(self.run.levels, axes, call, evaluate, others, draw, at)

    def __call__(self, draw, new, at, in_new, in_at, in_aux, sums, runs):
        """Undo `new = (1 - beta) * old + beta * map(at)`.

        **Arguments:**

        - `draw`: the draws of the step.
        - `new`, `at`: the two iterates.
        - `in_new`, `in_at`, `in_aux`: the cotangents of the iterates and of the auxiliary
            output.
        - `sums`: those of `wanted`.
        - `runs`: whether an example takes part in this step.

        **Returns:**

        The old iterate, its cotangent, that of `at`, and the new sums.
        """
        coupling = self.run.coupling
        beta = coupling.relaxation
        (value, _), pull = jax.vjp(
            lambda at, held: self.evaluate(at, held, draw), at, self.wanted
        )
        # An iterate that is undone already stays as it is, and adds nothing to the sums.
        where = lambda a, b: jnp.where(expanded(runs, a.ndim), a, b)
        in_value = in_dtypes([where(beta * a, 0) for a in in_new], value)
        more, into = pull((in_value, in_aux))
        old = jax.tree.map(where, coupling.unmixed(new, value), new)
        in_old = [where((1 - beta) * a, a) for a in in_new]
        in_at = added(in_at, jax.tree.leaves(more))
        return old, in_old, in_at, added(sums, jax.tree.leaves(into))


_LOSSES = (
    "The losses of `ReversiblePicard` are norms of residuals, which have no derivative "
    "under `ReversibleAdjoint`. Compute what you need from `solution.value`."
)
