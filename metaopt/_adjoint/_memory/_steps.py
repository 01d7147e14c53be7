"""Plans that treat every step alike."""

import equinox as eqx
import jax

from ..._core._validate import check_count
from ._base import AbstractMemoryPlan, remade, with_mixed_mode


class StoreAll(AbstractMemoryPlan):
    """Keeps what every step computed: the fewest operations, and memory that grows with
    `num_steps` times the activations of a step. Not for long runs of large models.

    Its hypergradient can be differentiated again, as can that of
    [`metaopt.memory.Blocks`][] of it, and of no other plan.

    **Arguments:**

    - `unroll`: how many steps are compiled one after the other before they are repeated.
        Loops of a few steps run a little faster so, and take longer to compile.
    """

    unroll: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        check_count(self.unroll, "unroll")

    def prepare(self, loop):
        return loop

    def scan(self, body, state, draws, length):
        return jax.lax.scan(body, state, draws, length, unroll=min(self.unroll, length))

    @property
    def num_repeats(self):
        return 0

    def num_stored(self, length):
        return length


class StoreUpdates(AbstractMemoryPlan):
    """Keeps the params before every step and what the optimizer computed, and nothing
    of the loss: memory grows with `num_steps` times two or three times the params.

    Each gradient is differentiated in mixed mode, forward over reverse, which costs about
    half a gradient more in each step than [`metaopt.memory.StoreAll`][] (Kemaev et al.,
    2025). Use it where activations take more room than params.
    """

    def prepare(self, loop):
        return with_mixed_mode(loop)

    def scan(self, body, state, draws, length):
        return jax.lax.scan(body, state, draws, length)

    @property
    def num_repeats(self):
        return 0

    def num_stored(self, length):
        return length


class RecomputeSteps(AbstractMemoryPlan):
    """Keeps the state before every step and makes the inside of each step again: memory
    grows with `num_steps` times the params and solver state.

    Like [`metaopt.memory.StoreUpdates`][] in mixed mode. It saves memory in addition where
    the state is smaller than what the optimizer computes from it: half of it for plain
    gradient descent and nothing with momentum.
    """

    def prepare(self, loop):
        return with_mixed_mode(loop)

    def scan(self, body, state, draws, length):
        return jax.lax.scan(remade(body), state, draws, length)

    @property
    def num_repeats(self):
        return 1

    def num_stored(self, length):
        return length
