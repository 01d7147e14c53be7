"""From the value and the range that a user writes to the array that stands for them."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._core._tree import tree_widened
from .._core._validate import canonical_arrays, check_real


def initial_raw(
    value: Any,
    invert: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    requirement: str,
    *,
    wide: bool = False,
) -> Float[Array, "..."]:
    """The array `raw` that stands for `value`.

    **Arguments:**

    - `value`: a number or an array, as the user wrote it.
    - `invert`: from `value`, in at least float32, to `raw`: infinite or NaN where `value`
        is out of range, which is how that is found.
    - `requirement`: how an error goes on after "`value`", for example "must be positive".
    - `wide`: whether `raw` is at least float32 even where `value` is not.

    **Returns:**

    A floating-point array of the shape of `value`, without weak type, in the dtype of
    `value` if that is a floating-point one.

    **Raises:**

    `ValueError` saying what was given. Numbers that are not known yet, inside of `jax.jit`
    for example, cannot be refused: `raw` is infinite or NaN there.
    """
    _check_numeric(value)

    def converted():
        x = _as_float(value)
        raw = invert(tree_widened(x))
        return x, raw if wide else raw.astype(x.dtype)

    if isinstance(value, jax.core.Tracer):
        return converted()[1]
    # Inside of a user's own `jax.jit` even numbers that are known would be traced, unless
    # they are computed with now.
    with jax.ensure_compile_time_eval():
        x, raw = converted()
        x, bad = np.asarray(x), np.argwhere(~np.isfinite(np.asarray(raw)))
    if len(bad) > 0:
        index = bad[0].tolist()
        where = f"`value{index}`" if index else "`value`"
        raise ValueError(f"{where} {requirement}; got {x[tuple(index)]} in {x.dtype}.")
    return raw


def _check_numeric(value: Any) -> None:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        numeric = jnp.issubdtype(value.dtype, jnp.number)
    else:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric:
        raise ValueError(f"`value` must be a number or an array of them; got {value!r}.")
    check_real(value, "value")


def _as_float(value: Any) -> Float[Array, "..."]:
    value = canonical_arrays(value, "value")
    if eqx.is_inexact_array(value):
        return value
    return jnp.asarray(value, jnp.result_type(float))


def canonical_range(low: Any, high: Any) -> tuple[float, float]:
    """`low` and `high` as Python floats.

    **Raises:**

    `ValueError` unless they are finite numbers, and `low` the smaller one.
    """
    for name, number in (("low", low), ("high", high)):
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise ValueError(
                f"`{name}` must be a Python number, which is one for all entries of "
                f"`value` and is not tuned; got {number!r}."
            )
        if not math.isfinite(number):
            raise ValueError(f"`{name}` must be finite; got {number!r}.")
    if not low < high:
        raise ValueError(f"`low` must be less than `high`; got {low!r} and {high!r}.")
    return float(low), float(high)
