"""Rewriting a function through its jaxpr: some of its operations become others."""

import functools as ft
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.extend as jex
import jax.extend.core.primitives as prims
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


_Fn = TypeVar("_Fn", bound=Callable[..., Any])
_Jaxpr = (jex.core.Jaxpr, jex.core.ClosedJaxpr)  # one class since JAX 0.11


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
    return _rewritten(fn, _Rewriting(_has_float_condition, _carry, _CALLS | _CUSTOM))


def finite_derivatives(fn: _Fn) -> _Fn:
    """`fn`, with partial derivatives that are zero wherever they would not be finite.

    Use it on the update functions of optimisers that are differentiated, of which many
    divide by the root of something that can be exactly zero: their derivative is then
    0 * inf = NaN, although the function is constant, or smooth, in the direction asked
    for. Do not use it on a loss: there a derivative that is not finite is news.

    It concerns `sqrt`, `rsqrt`, `cbrt`, `div`, `pow`, negative integer powers, `log`
    and `log1p` of real numbers, and products with something that is not finite (as in
    the branch that `jnp.where` does not take), everywhere but in functions with custom
    derivatives, which keep their own. The values of `fn` do not change, and neither do
    its derivatives where the partial derivatives of these operations are finite. Second
    derivatives follow the same rule.

    **Arguments:**

    - `fn`: any function that can be traced. Its arguments and results are pytrees; what
        is not a JAX array in them passes through as it is.

    **Returns:**

    A function with the arguments and the results of `fn`.
    """
    return _rewritten(fn, _Rewriting(_has_unbounded_derivative, _mask, _CALLS))


#
# The interpreter
#


class _Rewriting(NamedTuple):
    """Which operations are replaced, by what, and where they are looked for."""

    applies: Callable[[jex.core.JaxprEqn], bool]
    replace: Callable[[jex.core.JaxprEqn, list[Any], "_Rewriting"], Sequence[Any]]
    enters: frozenset[jex.core.Primitive]


_CUSTOM = frozenset({prims.custom_jvp_call_p, prims.custom_vjp_call_p})
_CALLS = frozenset(
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


def _rewritten(fn: _Fn, rewriting: _Rewriting) -> _Fn:
    @ft.wraps(fn)
    def wrapper(*args, **kwargs):
        dynamic, static = eqx.partition((args, kwargs), eqx.is_array)

        def from_arrays(dynamic):
            args, kwargs = eqx.combine(dynamic, static)
            return fn(*args, **kwargs)

        # What `fn` closes over, tracers included, becomes a constant of the jaxpr, and
        # keeps its derivatives because the jaxpr is evaluated in the same trace.
        jaxpr, struct, rest = eqx.filter_make_jaxpr(from_arrays)(dynamic)
        out = _evaluate(jaxpr, jax.tree.leaves(dynamic), rewriting)
        out = jax.tree.unflatten(jax.tree.structure(struct), map(jnp.asarray, out))
        return eqx.combine(out, rest)

    return cast(_Fn, wrapper)


def _evaluate(jaxpr: jex.core.ClosedJaxpr, args, rewriting: _Rewriting) -> list[Any]:
    """The outputs of a closed jaxpr at `args`, rewritten on the way."""
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


def _inner_jaxprs(eqn) -> Iterator[Any]:
    leaves = jax.tree.leaves(tuple(eqn.params.values()))
    return (leaf for leaf in leaves if isinstance(leaf, _Jaxpr))


def _applies_within(eqn, rewriting: _Rewriting) -> bool:
    return eqn.primitive in rewriting.enters and any(
        rewriting.applies(inner) or _applies_within(inner, rewriting)
        for jaxpr in _inner_jaxprs(eqn)
        for inner in jaxpr.eqns
    )


def _bind_rewritten(eqn, inputs, rewriting: _Rewriting) -> Sequence[Any]:
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


def _bind_rewritten_remat(eqn, inputs, rewriting: _Rewriting) -> Sequence[Any]:
    # The jaxpr of `remat` must be without constants: they become inputs.
    jaxpr = eqn.params["jaxpr"]
    closed = _rewrite_jaxpr(jex.core.ClosedJaxpr(jaxpr, []), rewriting)
    prevent_cse = eqn.params["prevent_cse"]
    if closed.consts:
        consts = closed.consts
        evaluate = ft.partial(_evaluate_with_consts, closed.jaxpr, len(consts))
        closed = jax.make_jaxpr(evaluate)(*consts, *(v.aval for v in jaxpr.invars))
        inputs = [*consts, *inputs]
        if isinstance(prevent_cse, tuple):
            prevent_cse = (True,) * len(consts) + prevent_cse
    new = {"jaxpr": closed.jaxpr, "prevent_cse": prevent_cse}
    return _bind(eqn.primitive, inputs, eqn.params | new)


def _evaluate_with_consts(jaxpr, num_consts: int, *args):
    closed = jex.core.ClosedJaxpr(jaxpr, args[:num_consts])
    return jex.core.jaxpr_as_fun(closed)(*args[num_consts:])


def _rewrite_jaxpr(jaxpr, rewriting: _Rewriting) -> jex.core.ClosedJaxpr:
    avals = [v.aval for v in jaxpr.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _evaluate(jaxpr, args, rewriting))(*avals)


def _rewrite_rule(rule, rewriting: _Rewriting):
    @ft.cache
    def rewritten_rule(*nonzeros):
        jaxpr, consts, *rest = rule.call_wrapped(*nonzeros)
        closed = _rewrite_jaxpr(jex.core.ClosedJaxpr(jaxpr, consts), rewriting)
        return closed.jaxpr, closed.consts, *rest

    return jex.linear_util.wrap_init(rewritten_rule, debug_info=rule.debug_info)


#
# Loops that carry their condition
#


def _has_float_condition(eqn) -> bool:
    return eqn.primitive is prims.while_p and _computes_floats(
        eqn.params["cond_jaxpr"].jaxpr
    )


def _computes_floats(jaxpr) -> bool:
    return any(
        any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars)
        or any(_computes_floats(inner) for inner in _inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _carry(eqn, inputs, rewriting: _Rewriting) -> Sequence[Any]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, inputs = inputs[:num_cond], inputs[num_cond:]
    body_consts, init = inputs[:num_body], inputs[num_body:]

    def condition(state):
        cond_jaxpr = eqn.params["cond_jaxpr"]
        return _evaluate(cond_jaxpr, [*cond_consts, *state], rewriting)[0]

    def body(carry):
        _, state = carry
        body_jaxpr = eqn.params["body_jaxpr"]
        state = _evaluate(body_jaxpr, [*body_consts, *state], rewriting)
        return condition(state), state

    _, out = lax.while_loop(lambda carry: carry[0], body, (condition(init), init))
    return out


#
# Operations with finite derivatives
#


def _has_unbounded_derivative(eqn) -> bool:
    if eqn.primitive not in _SLOPES:
        return False
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    is_literal = [isinstance(atom, jex.core.Literal) for atom in eqn.invars]
    if eqn.primitive is prims.integer_pow_p:
        return eqn.params["y"] < 0
    if eqn.primitive is prims.mul_p:
        return not any(is_literal)
    if eqn.primitive is prims.div_p:
        return not is_literal[1]
    return True


def _mask(eqn, inputs, rewriting: _Rewriting) -> Sequence[Any]:
    del rewriting
    operation = ft.partial(eqn.primitive.bind, **eqn.params)
    moves = tuple(
        jnp.issubdtype(atom.aval.dtype, jnp.floating)
        and not isinstance(atom, jex.core.Literal)
        for atom in eqn.invars
    )
    slopes = ft.partial(_SLOPES[eqn.primitive], **eqn.params)
    masked = ft.partial(_masked, operation, slopes, moves)
    return [_only_differentiated(operation, masked)(*inputs)]


def _masked(operation, slopes, moves: Sequence[bool], *inputs) -> Array:
    """The operation in two copies: one that is differentiated, and is kept away from
    where a slope is not finite, and one without derivatives for its value there.

    No rule is needed for the derivatives of this, of any order. A rule that masks the
    slope itself would do with one copy, but JAX 0.10 forgets such rules when it
    differentiates a `scan` twice, because partial evaluation unwraps them.
    """
    constant = [lax.stop_gradient(x) for x in inputs]
    value = operation(*constant)
    finite = jnp.ones(value.shape, bool)
    for slope, moving in zip(slopes(value, *constant), moves, strict=True):
        if moving:
            finite = finite & jnp.isfinite(slope())

    def away(x):
        x = jnp.broadcast_to(x, value.shape)
        return lax.select(finite, x, jnp.ones_like(x))

    inputs = [away(x) if moving else x for x, moving in zip(inputs, moves)]
    return lax.select(finite, operation(*inputs), value)


def _only_differentiated(operation, masked) -> Callable[..., Array]:
    """`operation`, with the derivatives of `masked`: where nothing is differentiated,
    the program is the same as before, and so is every bit of what it computes."""

    @jax.custom_jvp
    def out(*inputs):
        return operation(*inputs)

    def rule(inputs, tangents):
        moving = [not isinstance(t, SymbolicZero) for t in tangents]

        def of_moving(*moved):
            moved = iter(moved)
            return masked(*(next(moved) if m else x for x, m in zip(inputs, moving)))

        return jax.jvp(
            of_moving,
            [x for x, m in zip(inputs, moving) if m],
            [t for t, m in zip(tangents, moving) if m],
        )

    out.defjvp(rule, symbolic_zeros=True)
    return out


# The partial derivatives of each operation, given its value and its arguments. Every
# argument can be replaced by one, where all of these are finite.


def _sqrt_slopes(value, x, **_):
    return (lambda: 0.5 / value,)


def _rsqrt_slopes(value, x, **_):
    return (lambda: value / x,)


def _cbrt_slopes(value, x, **_):
    return (lambda: 1 / (3 * value * value),)


def _mul_slopes(value, x, y, **_):
    return (lambda: y, lambda: x)


def _div_slopes(value, x, y, **_):
    return (lambda: 1 / y, lambda: value / y)


def _pow_slopes(value, x, y, **_):
    # As in JAX: the slope in `x` is zero for an integer `y = 0`, and that in `y` is zero
    # for `x = 0`.
    power = lax.convert_element_type(y, value.dtype)
    lower = y - jnp.ones_like(y)
    if jnp.issubdtype(y.dtype, jnp.integer):
        lower = lax.select(jnp.equal(y, 0), jnp.ones_like(y), lower)
    log = jnp.log(lax.select(jnp.equal(x, 0), jnp.ones_like(x), x))
    return (lambda: power * lax.pow(x, lower), lambda: log * value)


def _integer_pow_slopes(value, x, *, y):
    return (lambda: y * lax.integer_pow(x, y - 1),)


def _log_slopes(value, x, **_):
    return (lambda: 1 / x,)


def _log1p_slopes(value, x, **_):
    return (lambda: 1 / (1 + x),)


_SLOPES: dict[jex.core.Primitive, Callable[..., tuple[Callable[[], Array], ...]]] = {
    prims.cbrt_p: _cbrt_slopes,
    prims.div_p: _div_slopes,
    prims.integer_pow_p: _integer_pow_slopes,
    prims.log1p_p: _log1p_slopes,
    prims.log_p: _log_slopes,
    prims.mul_p: _mul_slopes,
    prims.pow_p: _pow_slopes,
    prims.rsqrt_p: _rsqrt_slopes,
    prims.sqrt_p: _sqrt_slopes,
}
