"""Which outputs of a traced function can depend on which of its inputs.

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
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._types import PyTree


HELD_CONSTANT = "metaopt.held_constant"
"""The name scope of what metaopt itself holds constant for derivatives."""

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def dependence(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """For each output of `jaxpr`, whether it can depend on a marked input.

    What users hold constant with `jax.lax.stop_gradient` is no dependence: they do not
    ask for its derivative. What metaopt itself holds constant is one.
    """
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom) -> bool:
        return not isinstance(atom, Literal) and atom in marked

    for eqn in jaxpr.eqns:
        marks = [is_marked(atom) for atom in eqn.invars]
        if any(marks):
            outs = _equation(eqn, marks)
            marked.update(var for var, out in zip(eqn.outvars, outs) if out)
    return [is_marked(atom) for atom in jaxpr.outvars]


def _equation(eqn, marks: list[bool]) -> list[bool]:
    params, name = eqn.params, eqn.primitive.name
    if name == "stop_gradient" and HELD_CONSTANT not in str(eqn.source_info.name_stack):
        return [False]
    if name == "scan":
        body = params["jaxpr"].jaxpr
        consts, carry = _scan_counts(eqn, body)
        state = marks[consts : consts + carry]
        while True:
            outs = dependence(body, marks[:consts] + state + marks[consts + carry :])
            grown = [a or b for a, b in zip(state, outs[:carry])]
            if grown == state:
                return state + outs[carry:]
            state = grown
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
        state = marks[n_cond + n_body :]
        while True:
            outs = dependence(body, marks[n_cond : n_cond + n_body] + state)
            # A marked condition decides how often the body runs.
            stops = dependence(cond, marks[:n_cond] + state)[0]
            grown = [a or b or stops for a, b in zip(state, outs)]
            if grown == state:
                return state
            state = grown
    if name == "cond":
        branches = [dependence(b.jaxpr, marks[1:]) for b in params["branches"]]
        return [marks[0] or any(outs) for outs in zip(*branches)]
    for key in _CALLS:
        inner = params.get(key)
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(marks):
            outs = dependence(inner, marks)
            if len(outs) == len(eqn.outvars):
                return outs
    return [True] * len(eqn.outvars)


def _scan_counts(eqn, body: Jaxpr) -> tuple[int, int]:
    """How many constants and carries a `scan` has.

    Told by shapes, because the names of its parameters differ between versions of JAX:
    what is scanned over has one axis more outside than inside.
    """

    def count_scanned(outer, inner) -> int:
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))

    carry = len(eqn.outvars) - count_scanned(eqn.outvars, body.outvars)
    scanned = count_scanned(eqn.invars, body.invars)
    return len(eqn.invars) - carry - scanned, carry


def leaves_with_influence(fn: Callable[[PyTree], PyTree], x: PyTree) -> list[bool]:
    """For each leaf of `x` (arrays only), whether any output of `fn(x)` can change."""
    return [any(row) for row in influences(fn, x)]


def influences(fn: Callable[[PyTree], PyTree], x: PyTree) -> list[list[bool]]:
    """For each leaf of `x` (arrays only), which leaves of `fn(x)` can change with it."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    rows = np.eye(len(jaxpr.invars), dtype=bool).tolist()
    return [dependence(jaxpr, row) for row in rows]


def leaves_with_derivative(fn: Callable[[PyTree], PyTree], x: PyTree) -> list[bool]:
    """For each leaf of `x` (floating-point arrays only), whether the derivative of
    `fn(x)` with respect to it can be anything but zero."""
    return leaves_with_influence(lambda t: jax.jvp(fn, (x,), (t,))[1], x)


def depends(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether any output of `fn(x)` can change with any leaf of `x` (arrays only)."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    return any(dependence(jaxpr, [True] * len(jaxpr.invars)))


def evaluate_tracing_scale(
    fn: Callable[[jax.Array], tuple[PyTree, PyTree]], dtype
) -> tuple[PyTree, PyTree, PyTree]:
    """Evaluates `linear, rest = fn(scale)` at `scale = 1`, tracing `fn` just once.

    **Returns:**

    `linear`, `rest`, and for each leaf of `linear`, in a pytree like it, whether it
    depends on `scale` at all. With `scale` multiplying a cotangent and `linear` its
    pullback, a leaf that does not depend on it is zero by construction.
    """
    one = jnp.ones((), dtype)
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(one)
    structure = jax.tree.structure(shapes)
    marks = jax.tree.unflatten(structure, dependence(closed.jaxpr, [True]))
    values = jax.tree.unflatten(structure, jax.extend.core.jaxpr_as_fun(closed)(one))
    (linear, rest), (reached, _) = values, marks
    return linear, rest, reached
