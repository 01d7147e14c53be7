"""Operations whose partial derivatives are zero where they would not be finite."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.extend as jex
import jax.extend.core.primitives as prims
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from ._interpreter import CALLS, inner_jaxprs, Rewriting, rewritten
from ._marks import propagate


_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def finite_derivatives(fn: _Fn) -> _Fn:
    """`fn`, with partial derivatives that are zero wherever they would not be finite.

    Use it on the update functions of optimizers that are differentiated, of which many
    divide by the root of something that can be exactly zero: their derivative is then
    0 * inf = NaN, although the function is constant, or smooth, in the direction asked
    for. Do not use it on a loss: there a derivative that is not finite is news.

    It concerns `sqrt`, `rsqrt`, `cbrt`, `div`, `pow`, negative integer powers, `log`
    and `log1p` of real numbers, and products with something that may not be finite (as
    in the branch that `jnp.where` does not take), everywhere but in functions with custom
    derivatives, which keep their own. Arguments that are not scalars, and arrays that
    `fn` closes over, are taken to be finite, so that a product with them costs nothing.

    The values of `fn` do not change, and neither do its derivatives where the partial
    derivatives of these operations are finite. Second derivatives follow the same rule. If
    there are such operations, the elementwise operations of `fn` are computed again in a
    reverse pass rather than kept.

    **Arguments:**

    - `fn`: any function that can be traced. Its arguments and results are pytrees; what
        is not a JAX array in them passes through as it is.

    **Returns:**

    A function with the arguments and the results of `fn`.
    """

    def rewriting_of(jaxpr):
        unbounded = _with_unbounded_derivatives(jaxpr.jaxpr)
        applies = lambda eqn: id(eqn) in unbounded
        around = remade_entrywise if unbounded else lambda fn: fn
        return Rewriting(applies, _mask, CALLS, around)

    return rewritten(fn, rewriting_of)


def has_unbounded_derivatives(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether `finite_derivatives` changes `fn` at `args`, a function without a loop of
    unknown length."""
    jaxpr = eqx.filter_make_jaxpr(fn)(*args)[0].jaxpr
    return not _has_while(jaxpr) and bool(_with_unbounded_derivatives(jaxpr))


def _has_while(jaxpr) -> bool:
    return any(
        eqn.primitive is prims.while_p
        or any(_has_while(inner) for inner in map(_open, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _open(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, jex.core.ClosedJaxpr) else jaxpr


def remade_entrywise(fn: _Fn) -> _Fn:
    """`fn`, of which all but matrix products is computed again for the derivative: kept,
    it would take more memory, and more time where memory is slow."""
    policy = jax.checkpoint_policies.dots_saveable
    return cast(_Fn, jax.checkpoint(fn, prevent_cse=False, policy=policy))


def _with_unbounded_derivatives(jaxpr) -> set[int]:
    """The operations in a program of which a derivative need not be finite, by their id.

    Products are among them where a factor may be infinite or not a number, which is
    followed through the program. Scalars that come in may be: the best loss so far, for
    example, before there is any.
    """
    found = set()

    def may_be_infinite(eqn, marks: list[bool]) -> list[bool]:
        if _has_unbounded_derivative(eqn, marks):
            found.add(id(eqn))
        inside = eqn.primitive in _FINITE and not any(map(_is_infinite, eqn.invars))
        if eqn.primitive is prims.integer_pow_p:
            inside = eqn.params["y"] >= 0
        return [
            (any(marks) or not inside) and _is_floating(atom.aval) for atom in eqn.outvars
        ]

    is_scalar = [_is_floating(atom.aval) and not atom.aval.shape for atom in jaxpr.invars]
    propagate(jaxpr, is_scalar, may_be_infinite)
    return found


def _is_infinite(atom) -> bool:
    if not isinstance(atom, jex.core.Literal) or not _is_floating(atom.aval):
        return False
    return not math.isfinite(atom.val)


def _is_floating(aval) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _has_unbounded_derivative(eqn, marks: list[bool]) -> bool:
    if eqn.primitive not in _SLOPES or not _is_floating(eqn.outvars[0].aval):
        return False
    is_literal = [isinstance(atom, jex.core.Literal) for atom in eqn.invars]
    if eqn.primitive is prims.integer_pow_p:
        return eqn.params["y"] < 0
    if eqn.primitive is prims.mul_p:
        # A factor that is a literal has no derivative, and one that is finite is the
        # derivative of the other.
        return any(marks) and not any(is_literal)
    if eqn.primitive is prims.div_p:
        return not is_literal[1]
    return True


def _mask(eqn, inputs, rewriting: Rewriting) -> Sequence[Any]:
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
    finite = jnp.ones_like(value, bool)
    for slope, moving in zip(slopes(value, *constant), moves, strict=True):
        if moving:
            finite = finite & jnp.isfinite(slope())

    def away(x):
        # Not `broadcast_to` where there is nothing to broadcast: over an explicit mesh the
        # result must be sharded as the value is.
        x = x if x.shape == value.shape else jnp.full_like(value, 1, x.dtype) * x
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

# Operations whose output is finite for finite inputs, but for overflow.
_FINITE = frozenset(
    {
        prims.abs_p,
        prims.add_p,
        prims.broadcast_in_dim_p,
        prims.cbrt_p,
        prims.ceil_p,
        prims.clamp_p,
        prims.concatenate_p,
        prims.convert_element_type_p,
        prims.copy_p,
        prims.cos_p,
        prims.cumsum_p,
        prims.dot_general_p,
        prims.dynamic_slice_p,
        prims.dynamic_update_slice_p,
        prims.floor_p,
        prims.gather_p,
        prims.iota_p,
        prims.logistic_p,
        prims.max_p,
        prims.min_p,
        prims.mul_p,
        prims.neg_p,
        prims.pad_p,
        prims.reduce_max_p,
        prims.reduce_min_p,
        prims.reduce_sum_p,
        prims.reshape_p,
        prims.rev_p,
        prims.round_p,
        prims.select_n_p,
        prims.sign_p,
        prims.sin_p,
        prims.slice_p,
        prims.sort_p,
        prims.square_p,
        prims.squeeze_p,
        prims.stop_gradient_p,
        prims.sub_p,
        prims.tanh_p,
        prims.transpose_p,
    }
)
