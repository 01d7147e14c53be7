"""The choice of a memory plan from shapes alone."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex

from ..._core._tree import split_trainable, tree_num_bytes
from ..._core._types import Hyper, ModelState, Params
from ..._jaxpr._dependence import dependence
from ..._solver import Loop
from ._base import AbstractMemoryPlan
from ._blocks import Blocks
from ._steps import StoreAll


# A tape up to this size is stored whole. Measured on one core of a CPU with steps that are
# estimated at 4 MiB: blocks take 8 % longer than all steps for 40 steps, and 5 % less for
# 100 steps, where new pages of memory cost more than a second forward pass.
_WHOLE = 384 * 2**20
# Beyond, blocks may keep this much: each level less costs one more forward pass, which for
# these steps is 15 % of the time.
_BLOCKS = 16 * 2**20
# Or the tape of the first number of steps, and that of the second up to a size.
_STEPS, _MORE_STEPS, _AT_MOST = 16, 64, 256 * 2**20
# So many steps on so few numbers are stored without a look at what one of them keeps,
# which takes a trace. One that keeps more than this many times what it is given takes
# what it took with `StoreAll`.
_SOON, _LARGEST = 200, 300
# A fourth level saves little and costs one more forward pass.
_MOST_LEVELS = 3


class AutomaticPlan(eqx.Module):
    """Chooses between storing all steps and blocks of stored steps, from shapes alone.

    Nothing is compiled. One step is traced and linearised, and the arrays that its
    reverse pass reads are counted. Both plans differentiate the steps plainly, so that
    the hypergradient can be differentiated again.
    """

    def choose(
        self, loop: Loop, params: Params, hyper: Hyper, model_state: ModelState
    ) -> AbstractMemoryPlan:
        """The plan for a loop.

        **Arguments:**

        - `loop`: the loop of a solver.
        - `params`, `hyper`, `model_state`: as for `loop.start`.
        """
        if loop.num_steps <= _STEPS:
            return StoreAll()
        size = tree_num_bytes((loop, params, hyper, model_state))
        if loop.num_steps <= _SOON and loop.num_steps * _LARGEST * size <= _WHOLE:
            return StoreAll()
        return plan_for(*step_bytes(loop, params, hyper, model_state), loop.num_steps)


def plan_for(tape: int, state: int, num_steps: int) -> AbstractMemoryPlan:
    """The plan for a number of steps: that of the fewest levels that keeps little.

    **Arguments:**

    - `tape`: the bytes that one step keeps for its reverse pass.
    - `state`: the bytes of the state before a step.
    - `num_steps`: the number of steps.
    """
    if tape * num_steps <= _WHOLE:
        return StoreAll()
    most = max(_BLOCKS, _STEPS * tape, min(_MORE_STEPS * tape, _AT_MOST))

    def fits(plan):
        inside = plan.block_length(num_steps)
        num_states = plan.num_stored(num_steps) - inside
        return num_states * state + inside * tape <= most

    plans = [Blocks(levels, StoreAll()) for levels in range(1, _MOST_LEVELS + 1)]
    return next(filter(fits, plans), plans[-1])


def step_bytes(
    loop: Loop, params: Params, hyper: Hyper, model_state: ModelState
) -> tuple[int, int]:
    """The bytes that one step of a loop keeps for its reverse pass, and those of the state
    before it.

    Nothing is computed. Arrays that are the same in every step, such as the data, are
    stored once and not counted.
    """
    # An abstract start, so that the program that runs holds no trace of this one.
    arrays, static = eqx.partition((loop, params, hyper, model_state), eqx.is_array)

    def kept(start: Any, arrays: Any):
        loop, params, hyper, model_state = eqx.combine(arrays, static)
        trainable, fixed = split_trainable(hyper)
        state, draw = start
        moving, still = eqx.partition(state, eqx.is_inexact_array)

        def step(moving, trainable):
            full = eqx.combine(trainable, fixed)
            state, loss = loop.step(full, eqx.combine(moving, still), draw)
            return eqx.filter((state, loss), eqx.is_inexact_array)

        return jax.tree.leaves(jax.vjp(step, moving, trainable)[1])

    def begin(arrays):
        loop, *arguments = eqx.combine(arrays, static)
        first = jax.tree.map(lambda leaf: leaf[0], loop.draws)
        return loop.start(*arguments), first

    start = jax.eval_shape(begin, arrays)
    return _moving_bytes(kept, start, arrays), tree_num_bytes(start[0])


def _moving_bytes(fn: Callable[..., list[Any]], moving: Any, fixed: Any) -> int:
    """The bytes of the arrays that `fn(moving, fixed)` returns and that depend on
    `moving`, each counted once."""
    jaxpr = jax.make_jaxpr(fn)(moving, fixed).jaxpr
    num_moving = len(jax.tree.leaves(moving))
    marks = [index < num_moving for index in range(len(jaxpr.invars))]
    depend = dependence(jaxpr, marks, despite_stop_gradient=True)
    counted = {
        var: var.aval
        for var, moves in zip(jaxpr.outvars, depend, strict=True)
        if moves and not isinstance(var, jex.Literal)
    }
    return sum(map(_num_bytes, counted.values()))


def _num_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
