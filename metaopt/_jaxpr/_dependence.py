"""The outputs of a traced function that can depend on each of its inputs.

A derivative that is zero *by construction* (a leaf of `hyper` that an adjoint cannot
see) is a property of the traced program, not of the numbers in it, so it is found by
walking the jaxpr. The walk is conservative: where it does not know a primitive it
assumes that every output depends on every input.
"""

from collections.abc import Callable, Sequence

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from .._core._types import PyTree
from ._rewrite import inner_jaxprs, propagate


HELD_CONSTANT = "metaopt.held_constant"
"""The name scope of what metaopt itself holds constant for derivatives."""


def dependence(
    jaxpr: Jaxpr, inputs: Sequence[bool], *, despite_stop_gradient: bool = False
) -> list[bool]:
    """For each output of `jaxpr`, whether it can depend on a marked input.

    A value behind a `jax.lax.stop_gradient` of the user is no dependence: its derivative is
    not asked for. A value that metaopt itself holds constant is one. Values depend on both.
    """
    rule = _values_depend if despite_stop_gradient else _depends
    return propagate(jaxpr, inputs, rule)


def _values_depend(eqn, marks: list[bool]) -> list[bool]:
    return [any(marks)] * len(eqn.outvars)


def _depends(eqn, marks: list[bool]) -> list[bool]:
    if eqn.primitive.name == "stop_gradient":
        if HELD_CONSTANT not in str(eqn.source_info.name_stack):
            return [False]
    return _values_depend(eqn, marks)


def leaves_with_influence(
    fn: Callable[[PyTree], PyTree], x: PyTree, *, despite_stop_gradient: bool = False
) -> list[bool]:
    """For each leaf of `x` (arrays only), whether any output of `fn(x)` can change."""
    rows = influences(fn, x, despite_stop_gradient=despite_stop_gradient)
    return [any(row) for row in rows]


def influences(
    fn: Callable[[PyTree], PyTree], x: PyTree, *, despite_stop_gradient: bool = False
) -> list[list[bool]]:
    """For each leaf of `x` (arrays only), which leaves of `fn(x)` can change with it."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    rows = np.eye(len(jaxpr.invars), dtype=bool).tolist()
    held = despite_stop_gradient
    return [dependence(jaxpr, row, despite_stop_gradient=held) for row in rows]


def depends(
    fn: Callable[[PyTree], PyTree], x: PyTree, *, despite_stop_gradient: bool = False
) -> bool:
    """Whether any output of `fn(x)` can change with any leaf of `x` (arrays only)."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    marks, held = [True] * len(jaxpr.invars), despite_stop_gradient
    return any(dependence(jaxpr, marks, despite_stop_gradient=held))


def passes_loop(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether the derivative of `fn` at `x` (arrays only) runs through a loop of unknown
    length, which forward mode can pass and reverse mode cannot."""
    if not _holds_loop(jax.make_jaxpr(fn)(x).jaxpr):
        return False
    return not is_transposable(lambda t: jax.jvp(fn, (x,), (t,))[1], x)


def is_transposable(linear: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether a linear function of `x` (arrays or their structures) holds no loop of
    unknown length that acts on it."""
    jaxpr = jax.make_jaxpr(linear)(x).jaxpr
    found = []

    def watch(eqn, marks: list[bool]) -> list[bool]:
        if eqn.primitive.name == "while" and any(marks):
            found.append(eqn)
        return _values_depend(eqn, marks)

    propagate(jaxpr, [True] * len(jaxpr.invars), watch)
    return not found


def _holds_loop(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return any(
        eqn.primitive.name == "while" or any(map(_holds_loop, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def without_derivative(fn: Callable[[PyTree], PyTree], x: PyTree) -> list[bool]:
    """For each leaf of `x` (arrays only), whether it acts on `fn(x)` and its derivative
    is zero by construction for all of that: rounding, comparisons, random draws, what is
    held constant."""
    acts = leaves_with_influence(fn, x, despite_stop_gradient=True)
    slopes = leaves_with_influence(lambda t: jax.jvp(fn, (x,), (t,))[1], x)
    return [a and not b for a, b in zip(acts, slopes, strict=True)]


def evaluate_tracing_scale(
    fn: Callable[[jax.Array], tuple[PyTree, PyTree]], dtype
) -> tuple[PyTree, PyTree, PyTree]:
    """Evaluate `linear, rest = fn(scale)` at `scale = 1`, tracing `fn` just once.

    **Returns:**

    `linear`, `rest`, and for each leaf of `linear`, in a pytree like it, whether it
    depends on `scale` at all. With `scale` multiplying a cotangent and `linear` its
    pullback, a leaf that does not depend on it is zero by construction.
    """
    one = jnp.ones((), dtype)
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(one)
    structure = jax.tree.structure(shapes)
    marks = jax.tree.unflatten(structure, dependence(closed.jaxpr, [True]))
    # A constant comes back as a number of JAX's own, which is no array to anybody.
    values = [
        value if isinstance(value, jax.Array) else jnp.asarray(value, aval.dtype)
        for value, aval in zip(jax.extend.core.jaxpr_as_fun(closed)(one), closed.out_avals)
    ]
    values = jax.tree.unflatten(structure, values)
    (linear, rest), (reached, _) = values, marks
    return linear, rest, reached
