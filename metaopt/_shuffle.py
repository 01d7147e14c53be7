"""The beginning of a random permutation, without the rest of it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._core._types import Key


_MAX_SORTED = 2**16  # rows, up to which a permutation is drawn as a whole
_NUM_ROUNDS = 16


def shuffled(key: Key, size: int, count: int) -> Array:
    """The first `count` entries of a random permutation of `size` numbers.

    Up to 65,536 numbers it is that of `jax.random.permutation`, which sorts them all.
    Beyond, each entry is computed by itself, so that a few of many cost next to nothing:
    a Feistel network, which is a permutation of the numbers of some bits for any hash, is
    repeated until its output is below `size`.

    **Arguments:**

    - `key`: a random key.
    - `size`: at least 1 and below 2**32.
    - `count`: at most `size`.

    **Returns:**

    Integers of shape `(count,)`, all different.

    ??? cite "Source"

        Black, Rogaway: *Ciphers with arbitrary finite domains*, 2002. For shuffling:
        Mitchell, Stokes, Frank, Holmes: *Bandwidth-optimal random shuffling for GPUs*,
        2022.
    """
    if size <= _MAX_SORTED:
        return jax.random.permutation(key, size)[:count]
    num_bits = (size - 1).bit_length()
    low_bits = num_bits // 2
    low, high = 2**low_bits - 1, 2 ** (num_bits - low_bits) - 1
    salts = jax.random.bits(key, (_NUM_ROUNDS // 2, 2), jnp.uint32)

    def one_round(halves, salt):
        left, right = halves
        left = left ^ (_hash(right ^ salt[0]) & jnp.uint32(high))
        right = right ^ (_hash(left ^ salt[1]) & jnp.uint32(low))
        return (left, right), None

    def permuted(numbers):
        halves = numbers >> low_bits, numbers & jnp.uint32(low)
        (left, right), _ = lax.scan(one_round, halves, salts)
        return (left << low_bits) | right

    def again(numbers):
        return jnp.where(numbers < size, numbers, permuted(numbers))

    numbers = permuted(jnp.arange(count, dtype=jnp.uint32))
    numbers = lax.while_loop(lambda x: jnp.any(x >= size), again, numbers)
    return numbers.astype(jnp.arange(0).dtype)


def _hash(x: Array) -> Array:
    """The last steps of MurmurHash3: every bit of the input moves about half of the
    output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
