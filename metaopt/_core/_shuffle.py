"""Random permutations of which each entry is computed by itself."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ._types import Key


_NUM_ROUNDS = 24  # fewer favour some orders of less than ten numbers


def permuted(
    keys: Key, which: Int[Array, " count"], places: Int[Array, " count"], size: int
) -> Int[Array, " count"]:
    """Entries of random permutations of `size` numbers.

    The cost is that of the entries asked for, however many numbers there are: a generalised
    Feistel network, which is a permutation of a few more numbers for any hash, is repeated
    until its output is below `size`.

    **Arguments:**

    - `keys`: random keys of shape `(num_permutations,)`, one for each permutation.
    - `which`: the permutation that each entry is one of.
    - `places`: the place of each entry in it, at least 0 and below `size`.
    - `size`: at least 1 and below 2**31.

    **Returns:**

    Integers below `size`, of shape `(count,)`.

    ??? cite "Source"

        Black, Rogaway: *Ciphers with arbitrary finite domains*, 2002. For shuffling:
        Mitchell, Stokes, Frank, Holmes: *Bandwidth-optimal random shuffling for GPUs*,
        2022.
    """
    # Numbers below `high * low` as pairs, hardly more of them than `size`. With an even
    # `high` a round can be an odd permutation; with two odd factors none could.
    high = math.isqrt(size - 1) + 1
    high += high % 2
    low = -(-size // high)
    rounds = _NUM_ROUNDS // 2
    salts = jax.vmap(lambda key: jax.random.bits(key, (rounds, 2), jnp.uint32))(keys)

    def one_round(pair, salts):
        left, right = pair
        salt = salts[which]
        left = (left + _hash(right ^ salt[:, 0])) % jnp.uint32(high)
        right = (right + _hash(left ^ salt[:, 1])) % jnp.uint32(low)
        return (left, right), None

    def applied(numbers):
        pair = numbers // jnp.uint32(low), numbers % jnp.uint32(low)
        pair, _ = lax.scan(one_round, pair, jnp.swapaxes(salts, 0, 1))
        return pair[0] * jnp.uint32(low) + pair[1]

    def again(numbers):
        return jnp.where(numbers < size, numbers, applied(numbers))

    numbers = applied(places.astype(jnp.uint32))
    numbers = lax.while_loop(lambda x: jnp.any(x >= size), again, numbers)
    return numbers.astype(places.dtype)


def _hash(x: Array) -> Array:
    """31 bits by the last steps of MurmurHash3: every bit of the input moves about half of
    the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) >> 1
