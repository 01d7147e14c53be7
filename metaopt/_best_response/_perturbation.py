"""The perturbations that a best-response layer responds to."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Perturbation(eqx.Module):
    """The outer variables, or a change of them, that bound layers answer to.

    **Attributes:**

    - `vector`: of shape `(num_hyper,)`.
    - `centred`: whether `vector` is zero and only its tangent counts. Layers then compute
        what they do when they are not bound, and leave out of their derivative what is
        zero at the centre, a matrix product for each layer whose response weights are its
        own. Second derivatives in `vector` lack it, too, though there it is not zero.
    """

    vector: Float[Array, " num_hyper"]
    centred: bool = eqx.field(static=True, default=False)

    def added(
        self,
        y: Array,
        matrix: Float[Array, "*rows num_hyper"],
        x: Array | None = None,
        *,
        axis: int = 0,
    ) -> Array:
        """`y + (matrix @ vector) * x`, or without `x` where that is `None`.

        **Arguments:**

        - `y`: what is perturbed.
        - `matrix`: its product with the vector has a single axis of rows, or broadcasts
            to `y` as it is.
        - `x`: of the shape of `y`.
        - `axis`: which axis of `y` counts the rows.
        """
        shape = matrix.shape[:-1]
        if len(shape) == 1 and y.ndim != 1:
            shape = tuple(-1 if i == axis else 1 for i in range(y.ndim))
        fn = _added_at_zero if self.centred else _added
        return fn(shape, y, matrix, self.vector.astype(matrix.dtype), x)


# The coefficients are as large as `x`, one for each example and row, and quickly made
# again: they are not kept for the reverse pass.
@ft.partial(jax.checkpoint, static_argnums=0)
def _scaled(shape, matrix, vector, x):
    coefficients = (matrix @ vector).reshape(shape)
    return coefficients if x is None else coefficients * x


def _added(shape, y, matrix, vector, x):
    return y + _scaled(shape, matrix, vector, x)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _added_at_zero(shape, y, matrix, vector, x):
    return _with_axes_of(y, matrix, vector, x)


def _with_axes_of(y, *others):
    # Under `jax.vmap` a custom rule and what it is for must agree on where the output has
    # an axis for the batch, and the tangent has one wherever any of `others` has: else jvp
    # of vmap of jit or scan fails, or has the wrong shape without notice. (As in
    # https://github.com/jax-ml/jax/issues/16374.) A sum over nothing does that.
    return y + sum(jnp.sum(a.ravel()[:0]) for a in others if a is not None)


@_added_at_zero.defjvp
def _(shape, primals, tangents):
    # The omitted term has the factor `vector`, which is zero; XLA could not know that, and
    # the tangent of `x` may have cost a matrix product.
    y, matrix, vector, x = primals
    out = _with_axes_of(y, matrix, vector, x)
    return out, tangents[0] + _scaled(shape, matrix, tangents[2], x)
