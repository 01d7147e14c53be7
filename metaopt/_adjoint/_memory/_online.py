"""Checkpoints that are placed while the loop runs."""

import math

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp

from ..._core._tree import explicit_mesh, padding
from ..._core._validate import check_count
from ._base import AbstractMemoryPlan, with_mixed_mode


class OnlineCheckpoints(AbstractMemoryPlan):
    r"""Keeps a fixed number of states of a loop whose length is not known beforehand.

    For solvers that stop at a tolerance: the loop ends where they stop, in the forward and
    in the reverse pass, whatever the most steps that they may take. Checkpoints are moved
    as the loop goes on. If the number of steps is known, [`metaopt.memory.Blocks`][] makes
    fewer steps again. Reverse mode only.

    **Arguments:**

    - `num_checkpoints`: how many states are kept; by default $\sqrt{2 T}$ for at most $T$
        steps, with which each step is made about twice more.

    ??? cite "Source"

        Stumm, Walther: *New algorithms for optimal online checkpointing*, 2010; Wang,
        Moin, Iaccarino: *Minimal repetition dynamic checkpointing*, 2009. The loop is
        that of Equinox.
    """

    num_checkpoints: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.num_checkpoints is not None:
            check_count(self.num_checkpoints, "num_checkpoints")

    def prepare(self, loop):
        return with_mixed_mode(loop)

    def scan(self, body, state, draws, length):
        if explicit_mesh(eqx.filter(state, eqx.is_array)) is not None:
            raise ValueError(
                "`OnlineCheckpoints` keeps its states in loops of Equinox, which take no "
                "arrays that are sharded over explicit axes of a mesh. Use "
                "`metaopt.memory.Blocks()`, or make the mesh with "
                "`axis_types=(AxisType.Auto,)`."
            )

        def goes_on(carry):
            state, _, _ = carry
            return jnp.logical_not(state.done)

        def step(carry):
            state, losses, index = carry
            draw = jax.tree.map(lambda leaf: leaf[index], draws)
            state, loss = body(state, draw)
            return state, losses.at[index].set(loss), index + 1

        losses = jnp.full(length, padding(), state.last_monitor.dtype)
        state, losses, _ = eqxi.while_loop(
            goes_on,
            step,
            (state, losses, jnp.zeros((), int)),
            max_steps=length,
            buffers=lambda carry: carry[1],
            kind="checkpointed",
            checkpoints=self.num_checkpoints,
        )
        return state, losses

    @property
    def num_repeats(self):
        return 2  # with the default number of checkpoints

    def num_stored(self, length):
        return self.num_checkpoints or math.isqrt(2 * length)
