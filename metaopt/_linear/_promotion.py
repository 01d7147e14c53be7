"""Vectors of several dtypes or shards, as methods that know of neither see them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import lineax as lx

from .._core._tree import (
    explicit_mesh,
    tree_dtype,
    tree_structs,
)
from .._core._types import Vector


_T = TypeVar("_T")


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


def in_auto_axes(
    fn: Callable[[lx.AbstractLinearOperator, Vector], tuple[Vector, _T]],
    operator: lx.AbstractLinearOperator,
    vector: Vector,
) -> tuple[Vector, _T]:
    """`fn(operator, vector)`, within which the axes of an explicit mesh are automatic.

    `lineax` makes arrays without asking how they are to be sharded, and cannot be called
    with explicit axes. Products with the operator have them still.

    **Arguments:**

    - `fn`: returns a vector like its second argument, and arrays, which are replicated.
    - `operator`, `vector`: the operator, and a vector that it applies to.

    **Returns:**

    Whatever `fn` raises.
    """
    shardings = jax.tree.map(lambda struct: struct.sharding, tree_structs(vector))
    mesh = explicit_mesh(vector)
    if mesh is None:
        return fn(operator, vector)

    def run(vector):
        explicit = jax.sharding.explicit_axes(operator.mv, in_sharding=(shardings,))
        product = lambda vector: explicit(vector)
        automatic = lx.FunctionLinearOperator(product, jax.eval_shape(lambda x: x, vector))
        return fn(automatic, vector)

    replicated = jax.sharding.PartitionSpec()
    with jax.sharding.use_abstract_mesh(mesh):
        solve: Any = jax.sharding.auto_axes(run, out_sharding=(shardings, replicated))
        return solve(vector)
