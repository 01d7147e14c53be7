"""Constants of strong convexity for linear models with a quadratic penalty."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._tree import split_trainable
from .._core._types import Hyper
from ._strong_convexity import constant, StrongConvexity


Penalty = float | jax.Array | Callable[[Hyper], Any]
"""The weights of a quadratic penalty: fixed ones, or a function of `hyper`."""


def ridge_bound(rows: Any, valid_rows: Any, penalty: Penalty) -> StrongConvexity:
    r"""Bound the error for ridge regression, with constants from the data.

    The inner loss is $\frac{1}{2n} \sum_i (x_i \cdot p - y_i)^2 + \frac{1}{2} \sum_j
    \lambda_j p_j^2$, and the outer loss is its first part on other data. For other losses
    the bound does not hold.

    **Arguments:**

    - `rows`: $x_i$, the training inputs, of shape `(n, d)`.
    - `valid_rows`: the inputs of the outer loss, of shape `(m, d)`.
    - `penalty`: $\lambda$, a scalar or an array of shape `(d,)`, not negative; or a
        function of `hyper` that returns it.

    **Returns:**

    A [`metaopt.accuracy.StrongConvexity`][] for `metaopt.ImplicitAdjoint(error=...)`.

    **Raises:**

    `ValueError` where `rows` and `valid_rows` are not matrices of as many columns.
    """
    rows, valid_rows = _matrices(rows, valid_rows)
    gram = jnp.matmul(rows.T, rows, precision="highest") / len(rows)

    def curvature(hyper):
        weights = jnp.broadcast_to(constant(penalty, hyper), (gram.shape[0],))
        matrix = gram + jnp.diag(weights)
        least = jnp.linalg.eigvalsh(matrix)[0]
        # The least eigenvalue is known to rounding of the largest.
        rounding = len(weights) * jnp.finfo(gram.dtype).eps * jnp.linalg.norm(matrix)
        return jnp.maximum(least - rounding, jnp.min(weights))

    return _bound(curvature, 0.0, _stretch(valid_rows), penalty)


def logistic_bound(rows: Any, valid_rows: Any, penalty: Penalty) -> StrongConvexity:
    r"""Bound the error for logistic regression, with constants from the data.

    The inner loss is $\frac{1}{n} \sum_i \log(1 + e^{z_i}) - y_i z_i + \frac{1}{2} \sum_j
    \lambda_j p_j^2$ with $z_i = x_i \cdot p$, and the outer loss is its mean of cross
    entropies on other data. For other losses the bound does not hold. The second
    derivative of a cross entropy in $z_i$ is at most 1/4 and the third $1 / (6 \sqrt 3)$.

    **Arguments:**

    - `rows`, `valid_rows`: as for [`metaopt.accuracy.ridge_bound`][].
    - `penalty`: likewise, and positive: without a penalty there is no strong convexity.

    **Returns:**

    A [`metaopt.accuracy.StrongConvexity`][] for `metaopt.ImplicitAdjoint(error=...)`.

    **Raises:**

    `ValueError` where `rows` and `valid_rows` are not matrices of as many columns.
    """
    rows, valid_rows = _matrices(rows, valid_rows)
    bend = _stretch(rows) * _longest(rows) / (6 * 3**0.5)
    return _bound(_least(penalty), bend, _stretch(valid_rows) / 4, penalty)


def softmax_bound(rows: Any, valid_rows: Any, penalty: Penalty) -> StrongConvexity:
    r"""Bound the error for softmax regression, with constants from the data.

    The inner loss is the mean cross entropy of `softmax(rows @ params)` and $\frac{1}{2}
    \sum_{jk} \lambda_{jk} p_{jk}^2$, with params of shape `(d, classes)`, and the outer
    loss is the mean cross entropy on other data. For other losses the bound does not hold.
    With $v$ a direction of the logits, the second derivative of $\log \sum_k e^{z_k}$ is
    the variance of $v$ under the softmax, at most $|v|^2 / 2$, and the third changes it
    at a rate of at most $|v|^2 / \sqrt 2$.

    **Arguments:**

    - `rows`, `valid_rows`: as for [`metaopt.accuracy.ridge_bound`][].
    - `penalty`: $\lambda$, a scalar or an array that broadcasts to `(d, classes)`,
        positive; or a function of `hyper` that returns it.

    **Returns:**

    A [`metaopt.accuracy.StrongConvexity`][] for `metaopt.ImplicitAdjoint(error=...)`.

    **Raises:**

    `ValueError` where `rows` and `valid_rows` are not matrices of as many columns.
    """
    rows, valid_rows = _matrices(rows, valid_rows)
    bend = _stretch(rows) * _longest(rows) / 2**0.5
    return _bound(_least(penalty), bend, _stretch(valid_rows) / 2, penalty)


def _bound(
    curvature: Callable[[Hyper], Array], bend: Any, slope: Any, penalty: Penalty
) -> StrongConvexity:
    return StrongConvexity(
        curvature,
        hessian_lipschitz=bend,
        cross_lipschitz=lambda hyper: _largest_slope(penalty, hyper),
        outer_lipschitz=slope,
    )


def _least(penalty: Penalty) -> Callable[[Hyper], Array]:
    return lambda hyper: jnp.min(jnp.asarray(constant(penalty, hyper)))


def _largest_slope(penalty: Penalty, hyper: Hyper) -> Array:
    """A bound on how fast the mixed derivative changes with the params.

    It is the derivative of the penalties in `hyper`, each row times a parameter.
    """
    trainable, static = split_trainable(hyper)
    of_floats = lambda floats: jnp.asarray(constant(penalty, eqx.combine(floats, static)))
    columns = jax.tree.leaves(jax.jacobian(of_floats)(trainable))
    size = of_floats(trainable).size
    squares = [jnp.sum(a.reshape(size, -1) ** 2, axis=1) for a in columns]
    return jnp.sqrt(jnp.max(jnp.sum(jnp.stack(squares), axis=0)))


def _stretch(rows: Array) -> Array:
    """The largest eigenvalue of the mean of the outer products of the rows."""
    slack = 1 + 10 * max(rows.shape) * jnp.finfo(rows.dtype).eps
    return slack * jnp.linalg.norm(rows, 2) ** 2 / len(rows)


def _longest(rows: Array) -> Array:
    return jnp.max(jnp.linalg.norm(rows, axis=1))


def _matrices(rows: Any, valid_rows: Any) -> tuple[Array, Array]:
    rows, valid_rows = _floats(rows), _floats(valid_rows)
    if rows.ndim != 2 or valid_rows.ndim != 2 or rows.shape[1] != valid_rows.shape[1]:
        raise ValueError(
            "`rows` and `valid_rows` must be matrices of as many columns, a row for each "
            f"example; got the shapes {rows.shape} and {valid_rows.shape}."
        )
    return rows, valid_rows


def _floats(rows: Any) -> Array:
    rows = jnp.asarray(rows)
    exact = jnp.issubdtype(rows.dtype, jnp.integer) or rows.dtype == bool
    return rows.astype(jnp.result_type(float)) if exact else rows
