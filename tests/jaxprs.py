"""What a function comes down to: its operations, and what its loops wait for."""

from collections.abc import Iterator

import equinox as eqx
import jax.extend as jex
import jax.numpy as jnp


def equations(jaxpr) -> Iterator[jex.core.JaxprEqn]:
    """All operations of a jaxpr, those of the functions that it calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def operations(fn, *args) -> list[jex.core.JaxprEqn]:
    jaxpr, _, _ = eqx.filter_make_jaxpr(fn)(*args)
    return list(equations(jaxpr.jaxpr))


def names(fn, *args) -> list[str]:
    return [eqn.primitive.name for eqn in operations(fn, *args)]


def loop_conditions(fn, *args) -> list[list]:
    """The operations in the condition of each `while_loop` that `fn` runs."""
    return [
        list(equations(eqn.params["cond_jaxpr"].jaxpr))
        for eqn in operations(fn, *args)
        if eqn.primitive.name == "while"
    ]


def with_floats(condition: list) -> list[str]:
    """The operations on floats among those of a condition."""
    return [
        eqn.primitive.name
        for eqn in condition
        if any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars)
    ]


def counts_steps(condition: list) -> bool:
    """Whether a condition compares integers, as the bound of a loop does."""
    return any(
        eqn.primitive.name == "lt" and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.integer)
        for eqn in condition
    )
