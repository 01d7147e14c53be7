"""Derivatives of an optimality as `lineax` linear operators."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._core._tree import (
    divided,
    split_trainable,
    tree_add,
    tree_length,
    tree_sharded_like,
    tree_structs,
)
from .._core._types import FloatScalar, PyTree, Vector
from .._jaxpr._linearise import linearised


def jacobian_operator(
    optimality: Callable[[Vector], Vector],
    params: Vector,
    tags: frozenset[object] = frozenset(),
) -> tuple[Vector, lx.AbstractLinearOperator]:
    """The Jacobian of an optimality at `params`, linearised once.

    For the gradient of a loss this is its Hessian, and a product costs two gradients
    instead of the 2.7 of a Hessian-vector product made anew, because the values at
    `params` are kept (Christianson, 1992).

    **Arguments:**

    - `optimality`: maps a vector to a vector of the same structure.
    - `params`: the point.
    - `tags`: the structure that the Jacobian promises, as `lineax` tags.

    **Returns:**

    The residual `optimality(params)` and the operator, which holds no matrix.
    """
    residual, product = linearised(optimality, params)
    structure = tree_structs(params)
    # Its transpose, and the promise that it is one's own, need one way to be sharded.
    residual = tree_sharded_like(residual, structure)
    sharded = lambda vector: tree_sharded_like(
        product(tree_sharded_like(vector, structure)), structure
    )
    return residual, lx.FunctionLinearOperator(sharded, structure, tags)


def jacobian_product(
    optimality: Callable[[Vector], Vector], params: Vector, vector: Vector
) -> Vector:
    """One product with the Jacobian of an optimality, for which nothing is kept.

    **Arguments:**

    - `optimality`: maps a vector to a vector of the same structure.
    - `params`: the point.
    - `vector`: what is multiplied; a vector like `params`.

    **Returns:**

    A vector like `params`.
    """
    return jax.jvp(optimality, (params,), (vector,))[1]


def gauss_newton_operator(
    predict: Callable[[Vector], PyTree],
    criterion: Callable[[PyTree, Vector], FloatScalar],
    params: Vector,
    tags: frozenset[object] = frozenset(),
) -> lx.AbstractLinearOperator:
    r"""The generalised Gauss-Newton operator of `criterion(predict(params), params)`.

    With the model replaced by $f + J (p - p_0)$, its Taylor polynomial at `params`, the
    loss has the gradient $J^T c_1 + c_2$, where $c_1$ and $c_2$ are the derivatives of
    the criterion in the predictions and the params. Along $v$ they change by the Hessian
    of the criterion times $(J v, v)$, and $J$ stays. A product is one with $J$ and one
    with its transpose, both linearised once, which is 4/3 of a gradient for a chain of
    matrix products, where one with the Hessian is 2.

    **Arguments:**

    - `predict`: maps a vector to a pytree, whose floating-point arrays are what the
        model predicts.
    - `criterion`: maps predictions and a vector to a scalar.
    - `params`: the point.
    - `tags`: the structure that the operator promises, as `lineax` tags.

    **Returns:**

    The operator, which holds no matrix.
    """
    static: Any = None

    def floats(params):
        nonlocal static
        predictions, rest = split_trainable(predict(params))
        arrays, static = eqx.partition(rest, eqx.is_array)
        return predictions, arrays

    predictions, push, arrays = jax.linearize(floats, params, has_aux=True)
    pull = jax.linear_transpose(push, params)
    rest = eqx.combine(arrays, static)
    slopes = jax.grad(lambda z, p: criterion(eqx.combine(z, rest), p), (0, 1))
    _, bend = jax.linearize(slopes, predictions, params)

    def product(vector):
        in_predictions, in_params = bend(push(vector), vector)
        (pulled,) = pull(in_predictions)
        return tree_sharded_like(tree_add(pulled, in_params), structure)

    structure = tree_structs(params)
    return lx.FunctionLinearOperator(product, structure, tags)


def cross_pullback(
    optimality: Callable[[Vector], Vector], hyper: Vector, cotangent: Vector
) -> Vector:
    """The transposed derivative of an optimality in `hyper`, applied to a vector.

    **Arguments:**

    - `optimality`: maps `hyper` to a vector, at fixed params.
    - `hyper`: the point.
    - `cotangent`: a vector with the structure of the optimality.

    **Returns:**

    A vector with the structure of `hyper`.
    """
    _, pullback = jax.vjp(optimality, hyper)
    (out,) = pullback(cotangent)
    return out


def newton_length(residual: Vector, operator: lx.AbstractLinearOperator) -> FloatScalar:
    """The length of the step to the solution, guessed from one product.

    With residual $r$ and Jacobian $A$ the distance to the solution is $|A^{-1}r|$.
    Along $r$ alone the operator stretches by $|Ar| / |r|$, which gives $|r|^2 / |Ar|$.
    It is an estimate from below where the residual has parts of higher curvature.
    """
    # The square of a small residual is zero, and zero would be taken for a solution.
    size = tree_length(residual)
    unit = divided(residual, jnp.where(size > 0, size, 1))
    length = size / tree_length(operator.mv(unit))
    # A residual of exactly zero is a solution whatever the operator.
    return jnp.where(size == 0, 0.0, length)
