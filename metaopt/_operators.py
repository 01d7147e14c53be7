"""Derivatives of an optimality as `lineax` linear operators."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx

from ._tree import divided, tree_scaled_norm, tree_structs
from ._types import FloatScalar, Vector


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
    residual, product = jax.linearize(optimality, params)
    structure = tree_structs(params)
    return residual, lx.FunctionLinearOperator(product, structure, tags)


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
    size = tree_scaled_norm(residual)
    unit = divided(residual, jnp.where(size > 0, size, 1))
    length = size / tree_scaled_norm(operator.mv(unit))
    # A residual of exactly zero is a solution whatever the operator.
    return jnp.where(size == 0, 0.0, length)
