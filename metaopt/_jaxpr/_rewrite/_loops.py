"""Loops that carry the value of their condition."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.extend.core.primitives as prims
import jax.numpy as jnp
from jax import lax

from ._interpreter import CALLS, CUSTOM, evaluate, inner_jaxprs, Rewriting, rewritten


_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def carry_conditions(fn: _Fn) -> _Fn:
    """`fn`, in which every `lax.while_loop` with floats in its condition carries the
    value of the condition as a bool instead.

    Use it around solvers of other libraries before they are batched with `jax.vmap`, as
    in `jax.vmap(carry_conditions(fn))`; our own loops do not need it. Under `jax.vmap`
    the condition of a loop is evaluated twice, once to decide whether any element goes
    on and once to decide which. A compiler that rounds the two copies differently then
    freezes an element that the loop goes on waiting for, for ever. After the rewriting
    the condition is evaluated in one place, at the end of each step.

    Loops are found inside `jit`, `scan`, `cond`, `while_loop`, `checkpoint`,
    `custom_linear_solve`, and inside functions with custom derivatives and what their
    rules run forward; not inside primitives that this module does not know, and not in
    functions that were batched before they were rewritten.

    **Arguments:**

    - `fn`: any function that can be traced. Its arguments and results are pytrees; what
        is not a JAX array in them passes through as it is.

    **Returns:**

    A function with the arguments, the results and the derivatives of `fn`.

    ??? cite "Source"

        The hang and this remedy: https://github.com/jax-ml/jax/issues/20628.
    """
    rewriting = Rewriting(_has_float_condition, _carry, CALLS | CUSTOM)
    return rewritten(fn, lambda jaxpr: rewriting)


def _has_float_condition(eqn) -> bool:
    return eqn.primitive is prims.while_p and _computes_floats(
        eqn.params["cond_jaxpr"].jaxpr
    )


def _computes_floats(jaxpr) -> bool:
    return any(
        any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars)
        or any(_computes_floats(inner) for inner in inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _carry(eqn, inputs, rewriting: Rewriting) -> Sequence[Any]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, inputs = inputs[:num_cond], inputs[num_cond:]
    body_consts, init = inputs[:num_body], inputs[num_body:]

    def condition(state):
        cond_jaxpr = eqn.params["cond_jaxpr"]
        return evaluate(cond_jaxpr, [*cond_consts, *state], rewriting)[0]

    def body(carry):
        _, state = carry
        body_jaxpr = eqn.params["body_jaxpr"]
        state = evaluate(body_jaxpr, [*body_consts, *state], rewriting)
        return condition(state), state

    _, out = lax.while_loop(lambda carry: carry[0], body, (condition(init), init))
    return out
