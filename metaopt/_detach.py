"""Running a function so that no derivative passes through it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

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


@eqx.filter_custom_jvp
def forbid_derivative(tree: Any, message: str) -> Any:
    """`tree`; a derivative with respect to it raises a `ValueError` with `message`.

    For a derivative that would be zero by construction, which nobody asks for on
    purpose. What is not differentiated passes freely.
    """
    return tree


@forbid_derivative.def_jvp
def _(primals, tangents):
    tree, message = primals
    raise ValueError(message)
