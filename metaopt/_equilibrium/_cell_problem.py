"""The fixed point of a cell, as a problem like any other."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._tree import split_trainable, tree_scaled_norm, tree_sub
from .._core._types import PyTree, Vector
from .._problem import AbstractFixedPointProblem
from ._cell import AbstractCell


class CellProblem(AbstractFixedPointProblem):
    """The fixed point of a cell at an input, whose arrays are the outer variables.

    **Attributes:**

    - `fixed`: what is no floating-point array of the cell or the input.
    """

    fixed: Any
    outer_name = "layer"

    def init(self, hyper, key):
        raise ValueError("A cell does not say where the solver starts.")

    def step(self, params, hyper, batch):
        return eqx.combine(hyper, self.fixed)(params)

    def relative_residual(self, z: PyTree, hyper: Vector, per_example: bool) -> Array:
        """The relative residual, the norm of `cell(state) - state` over that of the state:
        a scalar, or one for each entry of the leading axis."""
        before, after = (split_trainable(a)[0] for a in (z, self.step(z, hyper, None)))
        norm = jax.vmap(tree_scaled_norm) if per_example else tree_scaled_norm
        size, difference = norm(before), norm(tree_sub(after, before))
        return jnp.where(difference == 0, 0.0, difference / size)


def cell_problem(
    cell: Callable[..., Any], x: PyTree, start: PyTree
) -> tuple[CellProblem, Vector]:
    """The problem, and its outer variables.

    **Arguments:**

    - `cell`, `x`: the cell and its input.
    - `start`: a state, where a solver will start.

    **Raises:**

    `ValueError` where a state holds anything but floating-point arrays, or the cell does
    not return one like it.
    """
    for leaf in jax.tree.leaves(eqx.filter(start, eqx.is_array)):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                "The state of an equilibrium holds floating-point arrays only, and `z` has "
                f"one of {leaf.dtype}. Hand what does not change over in `x`."
            )
    if not jax.tree.leaves(eqx.filter(start, eqx.is_inexact_array)):
        raise ValueError(
            "The state of an equilibrium holds floating-point arrays, and the one to start "
            f"from has none: it is {start!r}. Look at `initial(x)`, or at `z`."
        )
    shapes = lambda tree: jax.tree.map(
        lambda a: (a.shape, str(a.dtype)), eqx.filter(tree, _is_array)
    )
    given = shapes(start)
    try:
        step = cell.prepare(x) if isinstance(cell, AbstractCell) else _Step(cell, x)
        returned = shapes(eqx.filter_eval_shape(step, start))
    except Exception as error:
        error.add_note(
            f"This came from `cell(z, x)`, for the state {given} and the input "
            f"{shapes(x)}. A cell takes one example under `jax.vmap(layer)(x)`, and what "
            "it is given otherwise; `initial(x)`, or `z`, says what a state is."
        )
        raise
    if given != returned:
        raise ValueError(
            "`cell(z, x)` must return a state like `z`, with its structure, shapes and "
            f"dtypes. For {given} it returned {returned}. Look at what the cell does, at "
            "`initial(x)`, and at `z` where you gave one."
        )
    if not jax.tree.leaves(split_trainable(step)[0]):
        # Nothing to differentiate in; a problem has an outer variable all the same.
        step = _Still(step, jnp.zeros(()))
    moving, fixed = split_trainable(step)
    return CellProblem(fixed), moving


class _Step(eqx.Module):
    """A cell at an input, as a function of the state."""

    cell: Callable[..., Any]
    x: PyTree

    def __call__(self, z: PyTree) -> PyTree:
        return self.cell(z, self.x)


class _Still(eqx.Module):
    """A step without floating-point arrays, beside one."""

    step: Callable[..., Any]
    nothing: Array

    def __call__(self, z: PyTree) -> PyTree:
        return self.step(z)


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
