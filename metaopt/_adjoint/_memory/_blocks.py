"""Blocks of steps, of which one at a time is made again."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._validate import check_count
from ._base import AbstractMemoryPlan, remade
from ._steps import StoreUpdates


class Blocks(AbstractMemoryPlan):
    r"""Keeps the state before each block of steps and makes one block at a time again.

    With one level, $\sqrt{T}$ blocks of $\sqrt{T}$ steps: memory grows with $2\sqrt{T}$
    and the work by one forward pass (Chen, Xu, Zhang and Guestrin, 2016). With $n$
    levels, blocks are split into blocks again: memory grows with $(n + 1) \sqrt[n+1]{T}$
    and the work by $n$ forward passes (Griewank, 1992). Use it for many steps.

    **Arguments:**

    - `num_levels`: how often a step is made again.
    - `steps`: what is kept of the steps in a block: [`metaopt.memory.StoreUpdates`][],
        [`metaopt.memory.RecomputeSteps`][] or [`metaopt.memory.StoreAll`][].
    """

    num_levels: int = eqx.field(default=1, static=True)
    steps: AbstractMemoryPlan = StoreUpdates()

    def __check_init__(self):
        check_count(self.num_levels, "num_levels")
        if not isinstance(self.steps, AbstractMemoryPlan):
            raise ValueError(
                "`steps` must be a memory plan such as `metaopt.memory.RecomputeSteps()`; "
                f"got {self.steps!r}."
            )

    def prepare(self, loop):
        return self.steps.prepare(loop)

    def scan(self, body, state, draws, length):
        return self._scan(body, state, draws, length, self.num_levels)

    @property
    def num_repeats(self):
        return self.num_levels + self.steps.num_repeats

    def num_stored(self, length):
        total = 0
        for level in range(self.num_levels, 0, -1):
            num_blocks, length = _split(length, level)
            total += num_blocks
        return total + self.steps.num_stored(length)

    def block_length(self, length: int) -> int:
        """The number of steps in an innermost block of a loop of `length` steps."""
        for level in range(self.num_levels, 0, -1):
            length = _split(length, level)[1]
        return length

    def _scan(self, body, state, draws, length, num_levels):
        if num_levels == 0:
            return self.steps.scan(body, state, draws, length)
        num_blocks, size = _split(length, num_levels)

        def block_of(size):
            return remade(lambda s, d: self._scan(body, s, d, size, num_levels - 1))

        whole = num_blocks * size
        blocks = jax.tree.map(
            lambda leaf: leaf[:whole].reshape(num_blocks, size, *leaf.shape[1:]), draws
        )
        state, losses = jax.lax.scan(block_of(size), state, blocks, num_blocks)
        losses = losses.reshape(-1)
        if whole < length:
            rest = jax.tree.map(lambda leaf: leaf[whole:], draws)
            state, last = block_of(length - whole)(state, rest)
            losses = jnp.concatenate([losses, last])
        return state, losses


def _split(length: int, num_levels: int) -> tuple[int, int]:
    """The number of blocks, and of steps in each, at the top of several levels.

    A number of blocks that leaves no rest is preferred where there is one nearby: a rest
    is one more program to compile.
    """
    ideal = length ** (1 / (num_levels + 1))
    low, high = math.ceil(ideal / 1.3), math.floor(ideal * 1.3)
    dividing = [n for n in range(max(low, 1), high + 1) if length % n == 0]
    num_blocks = min(dividing, key=lambda n: abs(n - ideal), default=max(1, round(ideal)))
    return num_blocks, length // num_blocks
