"""An interpreter of jaxprs that replaces some of their operations."""

import functools as ft
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.extend as jex
import jax.extend.core.primitives as prims
import jax.numpy as jnp


_Fn = TypeVar("_Fn", bound=Callable[..., Any])
_Jaxpr = (jex.core.Jaxpr, jex.core.ClosedJaxpr)  # one class since JAX 0.11


_Evaluation = Callable[[list[Any]], list[Any]]


class Rewriting(NamedTuple):
    """The operations to replace, their replacements, the primitives to look inside, and a
    wrapper around the evaluation of the whole."""

    applies: Callable[[jex.core.JaxprEqn], bool]
    replace: Callable[[jex.core.JaxprEqn, list[Any], "Rewriting"], Sequence[Any]]
    enters: frozenset[jex.core.Primitive]
    around: Callable[[_Evaluation], _Evaluation] = lambda evaluation: evaluation


# Primitives that a rewriting can look into. Functions with custom derivatives stand apart:
# a rewriting that changes derivatives leaves them alone.
CUSTOM = frozenset({prims.custom_jvp_call_p, prims.custom_vjp_call_p})
CALLS = frozenset(
    {
        prims.closed_call_p,
        prims.cond_p,
        prims.jit_p,
        prims.linear_solve_p,
        prims.remat_p,
        prims.scan_p,
        prims.while_p,
    }
)


def rewritten(fn: _Fn, rewriting_of: Callable[[jex.core.ClosedJaxpr], Rewriting]) -> _Fn:
    """`fn`, some of whose operations are replaced each time it is called.

    **Arguments:**

    - `rewriting_of`: what to replace in a program whose inputs are the arrays among the
        arguments of `fn`. Values that `fn` closes over are constants of the program.
    """

    @ft.wraps(fn)
    def wrapper(*args, **kwargs):
        dynamic, static = eqx.partition((args, kwargs), eqx.is_array)

        def from_arrays(dynamic):
            args, kwargs = eqx.combine(dynamic, static)
            return fn(*args, **kwargs)

        # Values that `fn` closes over, tracers included, become constants of the jaxpr, and
        # keep their derivatives because the jaxpr is evaluated in the same trace.
        jaxpr, struct, rest = eqx.filter_make_jaxpr(from_arrays)(dynamic)
        rewriting = rewriting_of(jaxpr)
        run = rewriting.around(lambda args: evaluate(jaxpr, args, rewriting))
        out = run(jax.tree.leaves(dynamic))
        out = jax.tree.unflatten(jax.tree.structure(struct), map(jnp.asarray, out))
        return eqx.combine(out, rest)

    return cast(_Fn, wrapper)


def evaluate(jaxpr: jex.core.ClosedJaxpr, args, rewriting: Rewriting) -> list[Any]:
    """The outputs of a closed jaxpr at `args`, with operations replaced."""
    values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    values.update(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for eqn in jaxpr.jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            if rewriting.applies(eqn):
                out = rewriting.replace(eqn, inputs, rewriting)
            elif _applies_within(eqn, rewriting):
                out = _bind_rewritten(eqn, inputs, rewriting)
            else:
                out = _bind(eqn.primitive, inputs, eqn.params)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _bind(primitive, inputs, params) -> Sequence[Any]:
    out = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return out if primitive.multiple_results else [out]


def inner_jaxprs(eqn) -> Iterator[Any]:
    """The jaxprs that an operation calls: a loop's body, the branches of a `cond`."""
    leaves = jax.tree.leaves(tuple(eqn.params.values()))
    return (leaf for leaf in leaves if isinstance(leaf, _Jaxpr))


def _applies_within(eqn, rewriting: Rewriting) -> bool:
    return eqn.primitive in rewriting.enters and any(
        rewriting.applies(inner) or _applies_within(inner, rewriting)
        for jaxpr in inner_jaxprs(eqn)
        for inner in jaxpr.eqns
    )


def _bind_rewritten(eqn, inputs, rewriting: Rewriting) -> Sequence[Any]:
    """The same call of other jaxprs: loops stay loops, and branches branches."""
    if eqn.primitive is prims.remat_p:
        return _bind_rewritten_remat(eqn, inputs, rewriting)

    def rewrite_if_jaxpr(leaf):
        return _rewrite_jaxpr(leaf, rewriting) if isinstance(leaf, _Jaxpr) else leaf

    params = {}
    for name, value in eqn.params.items():
        if isinstance(value, (*_Jaxpr, tuple)):
            value = jax.tree.map(rewrite_if_jaxpr, value)
        params[name] = value
    # A rule is stored as a function that makes a jaxpr, which can hold a loop as well.
    for name in {"fwd_jaxpr_thunk", "jvp_jaxpr_fun"} & params.keys():
        params[name] = _rewrite_rule(params[name], rewriting)
    return _bind(eqn.primitive, inputs, params)


def _bind_rewritten_remat(eqn, inputs, rewriting: Rewriting) -> Sequence[Any]:
    # The jaxpr of `remat` must be without constants: they become inputs.
    jaxpr = eqn.params["jaxpr"]
    closed = _rewrite_jaxpr(jex.core.ClosedJaxpr(jaxpr, []), rewriting)
    prevent_cse = eqn.params["prevent_cse"]
    if closed.consts:
        consts = closed.consts
        from_inputs = ft.partial(_evaluate_with_consts, closed.jaxpr, len(consts))
        closed = jax.make_jaxpr(from_inputs)(*consts, *(v.aval for v in jaxpr.invars))
        inputs = [*consts, *inputs]
        if isinstance(prevent_cse, tuple):
            prevent_cse = (True,) * len(consts) + prevent_cse
    new = {"jaxpr": closed.jaxpr, "prevent_cse": prevent_cse}
    return _bind(eqn.primitive, inputs, eqn.params | new)


def _evaluate_with_consts(jaxpr, num_consts: int, *args):
    closed = jex.core.ClosedJaxpr(jaxpr, args[:num_consts])
    return jex.core.jaxpr_as_fun(closed)(*args[num_consts:])


def _rewrite_jaxpr(jaxpr, rewriting: Rewriting) -> jex.core.ClosedJaxpr:
    avals = [v.aval for v in jaxpr.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: evaluate(jaxpr, args, rewriting))(*avals)


def _rewrite_rule(rule, rewriting: Rewriting):
    @ft.cache
    def rewritten_rule(*nonzeros):
        jaxpr, consts, *rest = rule.call_wrapped(*nonzeros)
        closed = _rewrite_jaxpr(jex.core.ClosedJaxpr(jaxpr, consts), rewriting)
        return closed.jaxpr, closed.consts, *rest

    return jex.linear_util.wrap_init(rewritten_rule, debug_info=rule.debug_info)
