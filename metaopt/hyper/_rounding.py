"""Rounding of which JAX does not say that the derivative is zero."""

import functools as ft

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded_down(x: Float[Array, "..."], message: str) -> Float[Array, "..."]:
    """`x` rounded down; a derivative with respect to it raises a `ValueError` with
    `message` where it is used.

    In reverse mode that is when it is traced, in forward mode when it is compiled. To
    trace how outputs depend on `x` is not yet to use a derivative: implicit adjoints do
    that in every solve, of which nobody may want one.
    """
    return jnp.floor(x)


@rounded_down.defjvp
def _(message, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return rounded_down(x, message), _refused_p.bind(tangent, message=message)


def _refuse(*args, message):
    raise ValueError(message)


def _batch(tangents, axes, *, message):
    return _refused_p.bind(*tangents, message=message), *axes


# A linear map that can be traced, but neither run nor transposed.
_refused_p = jex.Primitive("metaopt_refused")
_refused_p.def_impl(_refuse)
_refused_p.def_abstract_eval(lambda tangent, *, message: tangent)
ad.deflinear2(_refused_p, _refuse)
batching.primitive_batchers[_refused_p] = _batch
mlir.register_lowering(_refused_p, _refuse)
