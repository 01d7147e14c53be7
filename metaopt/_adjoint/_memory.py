"""What an unrolled adjoint keeps from the forward pass, and what it makes again."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._validate import check_count


class AbstractMemoryPlan(eqx.Module):
    """A way to run a loop so that its reverse pass fits in memory.

    All plans give the same derivative; they trade memory for a second computation.
    """

    @abc.abstractmethod
    def scan(self, body: Callable, carry: Any, xs: Any, length: int) -> tuple[Any, Any]:
        """Repeats `body` as `jax.lax.scan` does."""


class StoreAll(AbstractMemoryPlan):
    """Keeps what every step computed: the fewest operations, and memory that grows with
    `num_steps` times the activations of a step. Not for long runs of large models.
    """

    def scan(self, body, carry, xs, length):
        return jax.lax.scan(body, carry, xs, length)


class RecomputeSteps(AbstractMemoryPlan):
    """Keeps the state before every step and makes the inside of each step again: memory
    grows with `num_steps` times the params and solver state. Use it where activations
    are larger than params; for many steps [`metaopt.SqrtBlocks`][] keeps less.
    """

    def scan(self, body, carry, xs, length):
        return jax.lax.scan(_checkpoint(body), carry, xs, length)


class SqrtBlocks(AbstractMemoryPlan):
    r"""Keeps the state before each of $\sqrt{T}$ blocks and makes each block again:
    memory grows with $\sqrt{T}$, time by about one more forward pass (Chen, Xu, Zhang
    and Guestrin, 2016).

    **Arguments:**

    - `block_size`: the number of steps in a block; by default the square root of
        `num_steps`.
    """

    block_size: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.block_size is not None:
            check_count(self.block_size, "block_size")

    def scan(self, body, carry, xs, length):
        size = self.block_size or max(1, math.isqrt(length))
        blocks, rest = divmod(length, size)
        run_block = _checkpoint(lambda carry, x: jax.lax.scan(body, carry, x))
        head = jax.tree.map(
            lambda leaf: leaf[: blocks * size].reshape(blocks, size, *leaf.shape[1:]),
            xs,
        )
        carry, ys = jax.lax.scan(run_block, carry, head, blocks)
        ys = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ys)
        if rest:
            tail = jax.tree.map(lambda leaf: leaf[blocks * size :], xs)
            carry, last = run_block(carry, tail)
            ys = jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), ys, last)
        return carry, ys


def _checkpoint(body: Callable) -> Callable:
    # Inside a scan XLA cannot merge the two computations, so no barrier is needed.
    return jax.checkpoint(body, prevent_cse=False)
