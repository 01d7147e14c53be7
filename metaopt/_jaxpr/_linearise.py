"""Linearisations and linear solves that pass loops of unknown length."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax

from .._core._types import Vector
from ._dependence import is_transposable, passes_loop


def linearised(
    fn: Callable[[Vector], Vector], x: Vector
) -> tuple[Vector, Callable[[Vector], Vector]]:
    """The value of `fn` at `x`, and products with its Jacobian there, which reuse the
    stored intermediate values.

    Of a loop of unknown length nothing can be kept. JAX 0.10 linearises one to a program
    that cannot be differentiated again: its partial evaluation loses the names of the
    arguments, which the JVP rule of `while` reads. So where the derivative runs through
    such a loop a product is a Jacobian-vector product made anew.
    """
    converted = eqx.filter_closure_convert(fn, x)
    if passes_loop(converted, x):
        return converted(x), lambda vector: jax.jvp(converted, (x,), (vector,))[1]
    return jax.linearize(converted, x)


def linear_solve(
    product: Callable[[Vector], Vector],
    vector: Vector,
    solve: Callable[[Any, Vector], Any],
    *,
    transpose_solve: Callable[[Any, Vector], Any],
    symmetric: bool = False,
    has_aux: bool = False,
) -> Any:
    """`jax.lax.custom_linear_solve`, which forward mode can pass where the product holds
    a loop of unknown length. Reverse mode raises there, unless the product is symmetric.
    """
    if symmetric or is_transposable(product, vector):
        return jax.lax.custom_linear_solve(
            product,
            vector,
            solve,
            transpose_solve=transpose_solve,
            symmetric=symmetric,
            has_aux=has_aux,
        )
    solved = jax.lax.custom_linear_solve(product, vector, solve, has_aux=has_aux)
    solution, aux = solved if has_aux else (solved, None)
    solution = eqxi.nondifferentiable_backward(solution, msg=_LOOP_MESSAGE)
    return (solution, aux) if has_aux else solution


_LOOP_MESSAGE = (
    "The residual, step or cell whose solution is differentiated holds a loop of unknown "
    "length (`jax.lax.while_loop`, or `jax.lax.fori_loop` with traced bounds), which "
    "reverse mode cannot pass. Differentiate in forward mode, with `jax.jacfwd` or "
    "`jax.jvp`; or bound the loop: write `jax.lax.scan`, or `jax.lax.fori_loop` with "
    "Python ints as bounds."
)
