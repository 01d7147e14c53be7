"""Running a function so that no derivative passes through it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ._dependence import HELD_CONSTANT


def stop_gradient(tree: Any) -> Any:
    """`tree` with every floating-point array held constant for derivatives."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf,
        tree,
    )


def detached(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, held constant for derivatives.

    Holding the result constant would be enough for the numbers, but then JAX would
    still push tangents through every loop inside, including those of arrays that `fn`
    merely closes over. So those are made arguments and held constant beforehand.
    """
    converted = eqx.filter_closure_convert(fn, *args)
    with jax.named_scope(HELD_CONSTANT):
        converted, args = stop_gradient((converted, args))
    return converted(*args)


def forbid_derivative(tree: Any, message: str) -> Any:
    """`tree`; a derivative with respect to it raises a `ValueError` with `message`.

    For a derivative that would be zero by construction, which nobody asks for on purpose.
    Values that are not differentiated pass freely, and Python numbers stay what they are.
    """
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(_forbidden(arrays, message), rest)


@eqx.filter_custom_jvp
def _forbidden(arrays: Any, message: str) -> Any:
    return arrays


@_forbidden.def_jvp
def _(primals, tangents):
    _, message = primals
    raise ValueError(message)


@eqx.filter_custom_jvp
def unknown_derivative(value: Any, of: Any, *, message: str, throw: bool) -> Any:
    """`value`, whose derivative with respect to `of` is not known, and not zero.

    Reverse mode raises `message` if its cotangent is not zero, or gives NaN unless `throw`.
    Forward mode gives NaN, because it also computes derivatives that nobody asked for.

    **Arguments:**

    - `value`: a floating-point array.
    - `of`: a list of floating-point arrays.
    """
    return value


@unknown_derivative.def_jvp
def _(primals, tangents, *, message, throw):
    (value, _), (tangent, tangents) = primals, tangents
    if not jax.tree.leaves(tangents):
        return value, tangent

    def forward(matvec, b):
        return jnp.full_like(b, jnp.nan)

    def backward(matvec, cotangent):
        asked = cotangent != 0
        unknown = jnp.where(asked, jnp.nan, jnp.zeros_like(cotangent))
        return eqx.error_if(unknown, jnp.any(asked), message) if throw else unknown

    # A linear map that is its own transpose but for what it does to zero.
    total = sum(jnp.sum(t) for t in jax.tree.leaves(tangents))
    moved = jnp.broadcast_to(total, value.shape).astype(value.dtype)
    moved = jax.lax.custom_linear_solve(lambda x: x, moved, forward, backward)
    return value, moved if tangent is None else tangent + moved
