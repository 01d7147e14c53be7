"""A gauge of the cotangents along the path of a solver."""

import jax
import jax.numpy as jnp

from .._types import Vector


def new_gauge() -> jax.Array:
    """The input of a loop whose cotangent, after a reverse pass, says how the derivative
    grew: see `gauged`."""
    return jnp.zeros(3)


@jax.custom_vjp
def gauged(params: Vector, gauge: jax.Array) -> tuple[Vector, jax.Array]:
    r"""The params after a step and the gauge, both as they are.

    The reverse pass meets the cotangent $c$ of the params after each step, the last step
    first. The cotangent of the gauge collects three numbers:

    - the largest $\epsilon \sqrt{\sum_i c_i^2 p_i^2}$, the change of the outer loss when
      every param is rounded once, at random. $p_i^2$ stands for its mean in an array, so
      that a reverse pass has to keep no param,
    - the largest $\|c\|$,
    - the $\|c\|$ of the last step.
    """
    return params, gauge


def _forward(params, gauge):
    def variance(leaf):
        leaf, eps = leaf.astype(gauge.dtype), float(jnp.finfo(leaf.dtype).eps)
        return eps**2 * jnp.sum(leaf * leaf) / max(leaf.size, 1)

    leaves = jax.tree.leaves(params)
    return (params, gauge), jnp.stack([variance(leaf) for leaf in leaves])


def _backward(variances, cotangents):
    of_params, of_gauge = cotangents
    leaves = [leaf.astype(of_gauge.dtype) for leaf in jax.tree.leaves(of_params)]
    squares = jnp.stack([jnp.sum(leaf * leaf) for leaf in leaves])
    rounding, largest, last = of_gauge
    norm = jnp.sqrt(jnp.sum(squares))
    rounding = jnp.maximum(rounding, jnp.sqrt(jnp.sum(variances * squares)))
    last = jnp.where(last > 0, last, norm)
    return of_params, jnp.stack([rounding, jnp.maximum(largest, norm), last])


gauged.defvjp(_forward, _backward)
