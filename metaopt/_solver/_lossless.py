r"""Multiplication of integers by a fraction below one, undone to the last bit.

A momentum below one shrinks what it multiplies: $2^{16}$ neighbouring velocities become
$k$, so what tells them apart must be kept, $\log_2(2^{16} / k)$ bits for each. They go to
a *digit* beside each velocity, an integer $B$ below a bound $M$ that all velocities
share.

Let a velocity be $v = 2^{16} q + r$. The product keeps $q$ as $q k$ and has to map
$(r, B)$, in lexicographic order the numbers $n = r M + B$ below $W = 2^{16} M$, to a
pair $(d, B')$ with $d < k$, one to one. The numbers $n$ are cut into $k$ slots that
begin at $\lfloor d W / k \rfloor$: $d$ says in which slot $n$ lies, $B'$ where in it.

* A slot has at most $M' = \lceil W / k \rceil$ numbers, the next bound. It depends on the
  fractions alone and not on the data, so it is one scalar, and so is the decision to take
  16 bits off each digit when the bound has grown past a limit.
* The slots are as even as integers can be, so $v' = q k + d$ is $v k / 2^{16}$ up to one
  unit, whatever $M$: $r k / 2^{16} - 1 < d < (r + 1) k / 2^{16}$. The digit decides
  between the neighbours, which is rounding at random. With slots of equal size $M'$, as
  in arithmetic coding, the error would be $k / M$ units, and $M$ could not begin at 1.
* The bound grows by the factor $2^{16} / k$ but for rounding up, which costs a fraction
  $1 / M$ of a step's bits once $M$ is large and about two bits in all while it is small.

Nothing here is wider than 32 bits. Products of $n$ are taken modulo $2^{32}$, and only
differences of them are read, which are known to be small: $d$ is one of
$\lfloor r k / 2^{16} \rfloor$ and the number after it.

??? cite "Source"

    The idea of a buffer for what a momentum throws away: Maclaurin, Duvenaud, Adams:
    *Gradient-based hyperparameter optimization through reversible learning*, 2015,
    algorithm 3. There the remainder of a division and a digit that replaces it go through
    one long integer, which leaves an error of $k$ units; and the integer is arbitrarily
    long, where here it has a fixed width and a stack.
"""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._types import IntScalar


BITS = 16
"""Fractions are multiples of `2**-BITS`, and so many bits are taken off at once."""

ONE = 1 << BITS
MOST = 1 << 30
"""The largest bound: three of them fit in 32 bits."""


class Factor(eqx.Module):
    """A fraction `numerator / 2**16` and the bound on digits after a product with it.

    **Attributes:**

    - `numerator`: k, at most 2**16.
    - `bound`: M, before the product.
    - `whole`, `part`: the quotient and the remainder of `2**16 * M` by k.
    """

    numerator: IntScalar
    bound: IntScalar
    whole: IntScalar
    part: IntScalar

    def __init__(self, numerator: IntScalar, bound: IntScalar):
        quotient, rest = jnp.divmod(bound, numerator)
        self.numerator = numerator
        self.bound = bound
        self.whole = quotient * ONE + (rest << BITS) // numerator
        self.part = (rest << BITS) % numerator

    @property
    def grown(self) -> IntScalar:
        """The bound after the product."""
        return self.whole + (self.part > 0)


def multiply(value: jax.Array, digit: jax.Array, by: Factor) -> tuple[Any, Any]:
    """`value * by`, to one unit, and the digit that tells how to undo it."""
    k = by.numerator
    quotient = value >> BITS
    rest = (value & (ONE - 1)).astype(jnp.uint32)
    slot = (rest * k) >> BITS
    skipped, left = _divmod(slot * by.part, k)
    place = rest * by.bound + digit - (slot * by.whole + skipped)
    size = by.whole + (left + by.part >= k)
    beyond = place >= size
    slot = slot + beyond
    digit = place - jnp.where(beyond, size, jnp.uint32(0))
    product = quotient * k.astype(value.dtype) + slot.astype(value.dtype)
    return product, digit


def divide(value: jax.Array, digit: jax.Array, by: Factor) -> tuple[Any, Any]:
    """The value and the digit that `multiply` was given."""
    k = by.numerator
    quotient, slot = _floor_divmod(value, k.astype(value.dtype))
    slot = slot.astype(jnp.uint32)
    skipped, _ = _divmod(slot * by.part, k)
    rest, _ = _divmod(slot << BITS, k)
    place = slot * by.whole + skipped + digit - rest * by.bound
    more, digit = _divmod(place, by.bound)
    return quotient * ONE + (rest + more).astype(value.dtype), digit


def largest_bound(least: int) -> int:
    """The bound from which digits are shortened, for numerators of at least `least`."""
    return (MOST * least) >> BITS


def shortened(by: Factor, limit: int) -> tuple[Any, IntScalar]:
    """Whether the digits are shortened after a product, and the bound after that."""
    full = by.grown > limit
    return full, jnp.where(full, ((by.grown - 1) >> BITS) + 1, by.grown)


@ft.lru_cache
def num_words(num_steps: int, least: int) -> int:
    """The number of times that products by `least / 2**16` shorten digits."""
    bound, words = 1, 0
    for _ in range(num_steps):
        bound = -(-bound * ONE // least)
        if bound > largest_bound(least):
            bound, words = ((bound - 1) >> BITS) + 1, words + 1
    return words


# Integers are divided by way of floats, because processors have no vector instruction
# for it. Quotients are below 2**17.4 (of velocities below 2**30 by numerators above a
# tenth of 2**16), so that a quotient in float32 is off by less than 1/16 whatever the
# order of the operations; taken too small by that, its floor is right or one too small.
_OFF = 1 / 16


def _divmod(x: jax.Array, y: IntScalar) -> tuple[jax.Array, jax.Array]:
    guess = x.astype(jnp.float32) * (1 / y.astype(jnp.float32)) - _OFF
    guess = jnp.maximum(guess, 0).astype(jnp.uint32)
    rest = x - guess * y
    more = rest >= y
    return guess + more, rest - jnp.where(more, y, jnp.uint32(0))


def _floor_divmod(x: jax.Array, y: IntScalar) -> tuple[jax.Array, jax.Array]:
    if x.dtype != jnp.int32:
        return jnp.divmod(x, y)
    guess = jnp.floor(x.astype(jnp.float32) * (1 / y.astype(jnp.float32)) - _OFF)
    guess = guess.astype(x.dtype)
    rest = x - guess * y
    more = rest >= y
    return guess + more, rest - jnp.where(more, y, jnp.zeros_like(y))
