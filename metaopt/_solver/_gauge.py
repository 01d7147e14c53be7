"""A gauge of the cotangents along the path of a solver."""

import jax
import jax.numpy as jnp

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

    - `of_params`: the leaves of $c$.
    - `variances`: for each, $\epsilon^2$ times the mean of $p_i^2$.
    """
    leaves = [leaf.astype(gauge.dtype) for leaf in of_params]
    # Relative to the largest entry: the squares of a loss of any scale are numbers.
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]))
    safe = jnp.where(size > 0, size, 1)
    squares = jnp.stack([jnp.sum((leaf / safe) ** 2) for leaf in leaves])
    rounding, last_rounding, largest, last = gauge
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
        return eps**2 * jnp.sum(wide * wide) / max(leaf.size, 1)

    return jnp.stack([variance(leaf) for leaf in jax.tree.leaves(params)])


def _forward(params, gauge):
    return (params, gauge), rounding_variances(params)


def _backward(variances, cotangents):
    of_params, of_gauge = cotangents
    return of_params, measured(of_gauge, jax.tree.leaves(of_params), variances)


gauged.defvjp(_forward, _backward)
