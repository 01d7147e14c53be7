"""A gauge of the cotangents along the path of a solver."""

from typing import Any

import jax
import jax.numpy as jnp

from .._core._tree import max_of_sizes, sum_of_sizes
from .._core._types import Vector


def new_gauge() -> jax.Array:
    """The input of a loop whose cotangent, after a reverse pass, says how the derivative
    grew: see `gauged`."""
    return jnp.zeros(4)


@jax.custom_vjp
def gauged(params: Vector, gauge: jax.Array) -> tuple[Vector, jax.Array]:
    """The params after a step and the gauge, both unchanged.

    The reverse pass meets the cotangent of the params after each step, the last step
    first. The cotangent of the gauge collects what `measured` says of them.
    """
    return params, gauge


@jax.custom_vjp
def gauged_at_end(params: Vector, gauge: jax.Array) -> Vector:
    """The params after all the steps, unchanged: here the reverse pass begins, and the
    cotangent of the gauge becomes `scaled_gauge` of that of the params."""
    return params


def scaled_gauge(of_params: list[jax.Array], dtype: Any) -> jax.Array:
    """A gauge that has measured nothing, with the scale of a cotangent for largest norm.

    Its largest entry, which is never more than the norm that the first step measures.
    """
    sizes = [max_of_sizes(jnp.abs(leaf.astype(dtype))) for leaf in of_params]
    size = jnp.max(jnp.stack(sizes))
    return jnp.zeros(4, dtype).at[2].set(size)


def measured(
    gauge: jax.Array, of_params: list[jax.Array], variances: jax.Array
) -> jax.Array:
    r"""A gauge after one more step of a reverse pass.

    With $c$ the cotangent of the params, these four numbers:

    - the largest $\epsilon \sqrt{\sum_i c_i^2 p_i^2}$, the change of the outer loss when
      every param is rounded once, at random. $p_i^2$ stands for its mean in an array, so
      that a reverse pass has to keep no param,
    - the same after the last step,
    - the largest $\|c\|$,
    - the $\|c\|$ of the last step.

    **Arguments:**

    - `gauge`: these numbers so far, at first a `scaled_gauge`.
    - `of_params`: the leaves of $c$.
    - `variances`: for each, $\epsilon^2$ times the mean of $p_i^2$.
    """
    leaves = [leaf.astype(gauge.dtype) for leaf in of_params]
    rounding, last_rounding, largest, last = gauge
    # Relative to the largest norm so far, the squares of a loss of any scale are numbers,
    # and those that round to zero are of no largest norm. No pass over the entries is
    # needed for it, which in a small network would take as long as the squares.
    safe = jnp.where(largest > 0, largest, 1)
    squares = jnp.stack([sum_of_sizes((leaf / safe) ** 2) for leaf in leaves])
    norm = safe * jnp.sqrt(jnp.sum(squares))
    effect = safe * jnp.sqrt(jnp.sum(variances * squares))
    first = last == 0
    return jnp.stack(
        [
            jnp.maximum(rounding, effect),
            jnp.where(first, effect, last_rounding),
            jnp.maximum(largest, norm),
            jnp.where(first, norm, last),
        ]
    )


def rounding_variances(params: Vector) -> jax.Array:
    """The mean square of the rounding of an entry, for each leaf of the params."""

    def variance(leaf):
        wide, eps = leaf.astype(jnp.zeros(()).dtype), float(jnp.finfo(leaf.dtype).eps)
        return eps**2 * sum_of_sizes(wide * wide) / max(leaf.size, 1)

    return jnp.stack([variance(leaf) for leaf in jax.tree.leaves(params)])


def _forward(params, gauge):
    return (params, gauge), rounding_variances(params)


def _backward(variances, cotangents):
    of_params, of_gauge = cotangents
    return of_params, measured(of_gauge, jax.tree.leaves(of_params), variances)


gauged.defvjp(_forward, _backward)


def _forward_at_end(params, gauge):
    return params, gauge


def _backward_at_end(gauge, of_params):
    return of_params, scaled_gauge(jax.tree.leaves(of_params), gauge.dtype)


gauged_at_end.defvjp(_forward_at_end, _backward_at_end)
