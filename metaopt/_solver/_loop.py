"""The loop of an iterative solver, as a value that each adjoint runs by its own rule."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._results import first_failure, mask_result, RESULTS, where_result
from .._core._trace_once import call_once
from .._core._tree import padding, split_trainable, tree_all_finite, wide_dtype
from .._core._types import (
    Aux,
    Batch,
    BoolScalar,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._data import AbstractData
from .._problem import AbstractProblem
from ._base import AbstractBestIterateSolver, AbstractIterativeSolver, Outcome
from ._earlier import Earlier
from ._fixed_point import AbstractFixedPointSolver
from ._gauge import gauged, gauged_at_end


Scan = Callable[[Callable, Any, Any, int], tuple[Any, Any]]
"""`scan(body, carry, xs, length) -> (carry, ys)`, as `jax.lax.scan`."""


class LoopState(eqx.Module):
    """The state that one step of the loop hands to the next: arrays only."""

    params: Vector
    solver_state: Any
    model_state: ModelState
    aux: Aux
    num_steps: IntScalar
    done: BoolScalar
    converged: BoolScalar
    failed_step: IntScalar
    first_monitor: FloatScalar
    last_monitor: FloatScalar
    result: Any  # `None` where the solver knows of no failures of its own
    num_flat: Any  # `None` where the solver leaves out no derivatives
    gauge: Any  # `None` where nobody reads the cotangents along the path


class Loop(eqx.Module):
    """The steps of one inner solve, with all their draws planned.

    The three parts `start`, `step` and `finish` are everything an adjoint that follows
    the path needs: it chooses how `step` is repeated, and what is held constant.

    **Attributes:**

    - `problem`, `solver`, `data`: what is solved, how, and on what.
    - `static_params`: the leaves of the params that are not trained.
    - `draws`: a pair of the step numbers and the data's plan, stacked by step.
    - `key`: folded with the step number, the key of each step.
    - `gauge`: an array whose cotangent says how the derivative grew along the path, or
        `None`.
    - `earlier`: what the solver goes on from; `None` begins anew.
    """

    problem: AbstractProblem
    solver: AbstractIterativeSolver
    data: AbstractData
    static_params: Params
    draws: Any
    key: Key
    gauge: jax.Array | None
    earlier: Earlier | None

    def __init__(
        self,
        problem: AbstractProblem,
        solver: AbstractIterativeSolver,
        data: AbstractData,
        params: Params,
        key: Key,
        gauge: jax.Array | None = None,
        earlier: Earlier | None = None,
    ):
        plan_key, step_key = jax.random.split(key)
        num_steps = solver.num_steps
        self.problem = problem
        self.solver = solver
        self.data = data
        self.static_params = split_trainable(params)[1]
        self.draws = (jnp.arange(num_steps), data.plan(plan_key, num_steps))
        self.key = step_key
        self.gauge = gauge
        self.earlier = earlier

    @property
    def num_steps(self) -> int:
        """The number of steps of the whole loop."""
        return self.solver.num_steps

    def start(self, params: Params, hyper: Hyper, model_state: ModelState) -> LoopState:
        """The state before the first step."""
        trainable = split_trainable(params)[0]
        solver_state = self.solver.init(self.problem, trainable, hyper)
        if self.earlier is not None:
            solver_state = self.earlier.state(self.solver, trainable, solver_state)
        if self.problem.has_state:
            assert self.solver.state_policy is not None  # checked by the solver
            model_state = self.solver.state_policy.begin(model_state, self.num_steps)
        first = jax.tree.map(lambda leaf: leaf[0], self.draws)
        output = jax.eval_shape(
            lambda: call_once(
                self._advance, trainable, solver_state, model_state, hyper, first
            )
        )[-1]
        loss = output.monitor if output.loss is None else output.loss
        dtype = wide_dtype(output.monitor.dtype, loss.dtype)
        zero = jnp.zeros((), dtype)  # the first step sets both
        return LoopState(
            params=trainable,
            solver_state=solver_state,
            model_state=model_state,
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), output.aux),
            num_steps=jnp.zeros((), int),
            done=jnp.asarray(False),
            converged=jnp.asarray(False),
            failed_step=jnp.full((), -1),
            first_monitor=zero,
            last_monitor=zero,
            result=None if output.result is None else RESULTS.successful,
            num_flat=None if output.num_flat is None else jnp.zeros((), int),
            gauge=self.gauge,
        )

    def step(
        self, hyper: Hyper, state: LoopState, draw: Any
    ) -> tuple[LoopState, FloatScalar]:
        """One step; does nothing once the loop has stopped early."""
        if not self.solver.stops_early:
            return self._step(hyper, state, draw)

        def skip(state):
            return state, jnp.full_like(state.last_monitor, padding())

        def advance(state):
            return self._step(hyper, state, draw)

        return jax.lax.cond(state.done, skip, advance, state)

    def run(
        self,
        params: Params,
        hyper: Hyper,
        model_state: ModelState,
        scan: Scan = jax.lax.scan,
    ) -> Outcome:
        """The whole loop, differentiably; `scan` repeats the steps."""
        state = self.start(params, hyper, model_state)
        body = lambda state, draw: self.step(hyper, state, draw)
        state, losses = scan(body, state, self.draws, self.num_steps)
        return self.finish(state, losses)

    def run_primal(
        self, hyper: Hyper, state: LoopState, begin: int, end: int
    ) -> tuple[LoopState, jax.Array]:
        """Steps `begin` to `end` for their result alone, leaving off at convergence.

        Cannot be differentiated in reverse mode where the solver stops early.
        """
        draws = jax.tree.map(lambda leaf: leaf[begin:end], self.draws)
        if not self.solver.stops_early:
            step = lambda state, draw: self._step(hyper, state, draw)
            return jax.lax.scan(step, state, draws, end - begin)

        # The condition reads a carried bool and an integer: see `_rewrite/_loops.py`.
        def condition(carry):
            state, _, index = carry
            return jnp.logical_not(state.done) & (index < end - begin)

        def body(carry):
            state, losses, index = carry
            draw = jax.tree.map(lambda leaf: leaf[index], draws)
            state, loss = self._step(hyper, state, draw)
            return state, losses.at[index].set(loss), index + 1

        losses = jnp.full(end - begin, padding(), state.last_monitor.dtype)
        carry = state, losses, jnp.zeros((), int)
        state, losses, _ = jax.lax.while_loop(condition, body, carry)
        return state, losses

    def last_draw(self) -> tuple[Batch, Key]:
        """The batch and the key of the last step."""
        return self.drawn(jax.tree.map(lambda leaf: leaf[-1], self.draws))

    def drawn(self, draw: Any) -> tuple[Batch, Key]:
        """The batch and the key of one step; `draw` is one row of `draws`."""
        index, draw = draw
        return self.data.batch(draw), jax.random.fold_in(self.key, index)

    def finish(self, state: LoopState, losses: jax.Array) -> Outcome:
        """The outcome, from the state after the last step."""
        params, why = state.params, RESULTS.successful
        if isinstance(self.solver, AbstractBestIterateSolver):
            params, why = self.solver.conclude(params, state.solver_state, state.converged)
        if state.gauge is not None:
            params = gauged_at_end(params, state.gauge)
        finite = tree_all_finite(params)
        failed = jnp.logical_not(finite) | (state.failed_step >= 0)
        last = jnp.maximum(state.num_steps - 1, 0)
        failed_step = jnp.where(failed & (state.failed_step < 0), last, state.failed_step)
        grew = (failed_step > 0) & (state.last_monitor > state.first_monitor)
        result = mask_result(
            failed,
            where_result(grew, RESULTS.inner_diverged, RESULTS.inner_nonfinite),
        )
        if state.result is not None:
            result = first_failure(state.result, result)
        if self.solver.stops_early and not _by_budget_alone(self.solver):
            stopped_short = jnp.logical_not(state.converged | failed)
            short = first_failure(why, RESULTS.inner_max_steps)
            result = where_result(stopped_short, short, result)
        model_state = state.model_state
        if self.problem.has_state:
            assert self.solver.state_policy is not None  # checked by the solver
            model_state = self.solver.state_policy.finish(model_state, state.num_steps)
        return Outcome(
            params=eqx.combine(params, self.static_params),
            model_state=model_state,
            aux=state.aux if self.problem.has_aux else None,
            result=result,
            num_steps=state.num_steps,
            losses=losses,
            failed_step=failed_step,
            num_flat=state.num_flat,
            solver_state=state.solver_state,
        )

    def _advance(self, trainable, solver_state, carried, hyper, draw):
        index, draw = draw
        policy = self.solver.state_policy
        model_state = carried
        if policy is not None:
            model_state = policy.read(carried, index)
        params, solver_state, output = self.solver.step(
            self.problem,
            eqx.combine(trainable, self.static_params),
            solver_state,
            hyper,
            self.data.batch(draw),
            jax.random.fold_in(self.key, index),
            model_state,
        )
        if policy is not None:
            carried = policy.write(carried, output.model_state, index)
        return split_trainable(params)[0], solver_state, carried, output

    def _step(self, hyper, state: LoopState, draw) -> tuple[LoopState, FloatScalar]:
        params, solver_state, carried, output = call_once(
            self._advance,
            *(state.params, state.solver_state, state.model_state, hyper, draw),
        )
        index = draw[0]
        loss = output.monitor if output.loss is None else output.loss
        dtype = state.last_monitor.dtype
        monitor = jax.lax.stop_gradient(output.monitor).astype(dtype)
        finite = jnp.isfinite(monitor)
        converged = state.converged
        if output.converged is not None:
            converged = output.converged & finite
        failed, result = jnp.logical_not(finite), state.result
        if result is not None:
            failed = failed | (output.result != RESULTS.successful)
            result = first_failure(result, output.result)
        fails_first = failed & (state.failed_step < 0)
        done = converged | jnp.logical_not(finite)
        if output.stops is not None:
            done = done | output.stops
        params, gauge = _cast_like(params, state.params), state.gauge
        if gauge is not None:
            params, gauge = gauged(params, gauge)
        new = LoopState(
            params=params,
            solver_state=_cast_like(solver_state, state.solver_state),
            model_state=_cast_like(carried, state.model_state),
            aux=output.aux,
            num_steps=state.num_steps + 1,
            done=done,
            converged=converged,
            failed_step=jnp.where(fails_first, index, state.failed_step),
            first_monitor=jnp.where(index == 0, monitor, state.first_monitor),
            last_monitor=jnp.where(finite, monitor, state.last_monitor),
            result=result,
            num_flat=None if output.num_flat is None else state.num_flat + output.num_flat,
            gauge=gauge,
        )
        return new, loss.astype(dtype)


def _by_budget_alone(solver: AbstractIterativeSolver) -> bool:
    """Whether nothing but a number of steps was asked for."""
    return isinstance(solver, AbstractFixedPointSolver) and solver.rtol is None


def _cast_like(new: Any, old: Any) -> Any:
    """Keep the dtypes of the loop, so that float64 `hyper` can drive float32 params."""
    return jax.tree.map(
        lambda a, b: (
            a.astype(b.dtype)
            if eqx.is_inexact_array(a) and np.dtype(a.dtype) != np.dtype(b.dtype)
            else a
        ),
        new,
        old,
    )
