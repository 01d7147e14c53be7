"""Estimates of a hypergradient that are constant where they should not be."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import leaf_names
from .._core._types import (
    FloatScalar,
    PyTree,
    Vector,
)
from .._jaxpr._dependence import dependence
from .._problem import BilevelProblem


def check_direction(
    direction: Callable[[BilevelProblem, PyTree], Vector],
    problem: BilevelProblem,
    inputs: PyTree,
    exempt: Sequence[str],
    solver: str,
) -> None:
    """Raise a `ValueError` where an entry of an estimate of the hypergradient is a
    constant, although the losses depend on that leaf.

    A scale of the outer loss is an input as well, so that its derivative in a leaf on which
    it depends linearly is no constant.

    **Arguments:**

    - `direction`: `direction(problem, inputs)`, a vector like `hyper`.
    - `problem`, `inputs`: what it is computed from.
    - `exempt`: the leaves without influence, and those that the user holds constant.
    - `solver`: the name of the solver.
    """
    arrays, static = eqx.partition(inputs, eqx.is_array)

    def of_arrays(arrays, scale):
        return direction(_with_scale(problem, scale), eqx.combine(arrays, static))

    one = jnp.ones((), jnp.float32)
    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays, one)
    marks = dependence(closed.jaxpr, [True] * len(closed.jaxpr.invars))
    names = leaf_names(shapes, "hyper")
    constant = [
        f"`{name}`"
        for name, varies in zip(names, marks, strict=True)
        if not varies and name not in exempt
    ]
    if constant:
        raise ValueError(
            f"The derivative with respect to {', '.join(constant)} is zero by construction "
            f"under `{solver}`: the losses depend on it, and its entry in the `direction` "
            "depends on nothing. Add the derivative of the outer loss at fixed params and "
            "that by way of the inner problem."
        )


def _with_scale(problem: BilevelProblem, scale: FloatScalar) -> BilevelProblem:
    """A bilevel problem whose outer loss is multiplied by a number."""
    loss = problem.outer_loss

    # Tells the arguments that the loss declares.
    @functools.wraps(loss)
    def scaled(*args: Any, **optional: Any) -> Any:
        out = loss(*args, **optional)
        if not problem.has_aux:
            return out * scale.astype(out.dtype)
        value, aux = out
        return value * scale.astype(value.dtype), aux

    return BilevelProblem(problem.inner, scaled, has_aux=problem.has_aux)
