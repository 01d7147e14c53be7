"""Vectors of several dtypes, as methods that know only one see them."""

from typing import Any

import jax
import lineax as lx

from .._tree import (
    tree_dtype,
    tree_structs,
)
from .._types import Vector


def cast_up(vector: Vector) -> Vector:
    """`vector`, all leaves in the dtype of its scalars."""
    dtype = tree_dtype(vector)
    return jax.tree.map(lambda a: a.astype(dtype), vector)


def promoted(operator: lx.AbstractLinearOperator, vector: Vector) -> Any:
    """The operator on vectors of one dtype. `lineax` holds all leaves in one matrix and
    factorises it, which JAX does not do in half precision."""
    if all(a.dtype == tree_dtype(vector) for a in jax.tree.leaves(vector)):
        return operator

    def product(x):
        x = jax.tree.map(lambda a, b: a.astype(b.dtype), x, vector)
        return cast_up(operator.mv(x))

    return lx.FunctionLinearOperator(product, tree_structs(cast_up(vector)))
