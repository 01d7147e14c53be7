"""Fixed-point numbers: integers that stand for real numbers, as multiples of a unit."""

from typing import Any

import jax
import jax.numpy as jnp

from .._core._tree import wide_dtype
from .._core._types import BoolScalar


def encode(x: jax.Array, fraction_bits: int | None) -> tuple[jax.Array, BoolScalar]:
    """`x` as a fixed-point number, and whether it has one."""
    return to_integer(x.astype(wide(x.dtype)) * _unit(x.dtype, fraction_bits))


def decode(number: jax.Array, dtype: Any, fraction_bits: int | None) -> jax.Array:
    """The value of a fixed-point number, in `dtype`."""
    return number.astype(wide(dtype)) / _unit(dtype, fraction_bits)


def to_integer(x: jax.Array) -> tuple[jax.Array, BoolScalar]:
    """The nearest integer, and whether all are in range."""
    dtype = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    largest = _largest(dtype)
    inside = jnp.abs(x) < largest  # and not NaN
    x = jnp.where(inside, jnp.round(x), jnp.zeros_like(x))
    return x.astype(dtype), jnp.all(inside)


def bounded(x: jax.Array) -> tuple[jax.Array, BoolScalar]:
    """`x` held within the range, and whether it is in range."""
    largest = _largest(x.dtype)
    return jnp.clip(x, -largest, largest), jnp.all(jnp.abs(x) < largest)


def wide(dtype: Any) -> Any:
    """The floating-point dtype of the values that fixed-point numbers represent."""
    return wide_dtype(dtype)


@jax.custom_jvp
def straight(value: jax.Array, real: jax.Array) -> jax.Array:
    """`value`, with the derivative of `real`, of which it is a rounding."""
    return value


@straight.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]


def _unit(dtype: Any, fraction_bits: int | None) -> float:
    bits = fraction_bits
    double = wide(dtype) == jnp.float64
    if bits is None:
        bits = 48 if double else 22
    if bits > (60 if double else 29):
        raise ValueError(
            f"`fraction_bits` is {bits}, which leaves no range for params of dtype "
            f"{dtype}. At most 29 fit, and 60 for float64."
        )
    return float(2**bits)


def _largest(dtype: Any) -> int:
    """The bound on fixed-point numbers: the sum of two is an integer."""
    return 2**62 if dtype == jnp.int64 else 2**30
