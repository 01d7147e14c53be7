"""Momentum in integers, exact to the last bit: its steps and their inverses."""

import abc
import functools as ft
import math
from collections.abc import Callable, Iterable
from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from ._base import AbstractIterativeSolver
from ._fixed_point_numbers import bounded, decode, encode, straight, to_integer
from ._lossless import (
    BITS,
    divide,
    Factor,
    largest_bound,
    multiply,
    num_words,
    ONE,
    shortened,
)


_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def _promoting(fn: _Fn) -> _Fn:
    """`fn`, in which integers, booleans and floats may meet, whatever users ask of their
    own arithmetic."""

    @ft.wraps(fn)
    def wrapper(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return fn(*args, **kwargs)

    return cast(_Fn, wrapper)


class Exact(eqx.Module):
    """The exact state of the solver: a list of integer arrays for each.

    **Attributes:**

    - `position`, `velocity`: fixed-point numbers for the leaves of the params, int32
        (int64 for float64).
    - `digit`: uint32, what the momentum threw away lately.
    - `height`: how many words of each digit were taken off before.
    """

    position: list[jax.Array]
    velocity: list[jax.Array]
    digit: list[jax.Array]
    height: IntScalar


class ReversibleState(eqx.Module):
    """The state that one step hands to the next, beside the params.

    **Attributes:**

    - `exact`: the integers that the step works on.
    - `bound`: what all digits are below.
    - `excess`: by how much the momenta so far were rounded, in multiples of 2**-16.
    - `words`: the words taken off, uint16, stacked on a leading axis; `None` where the
        steps will not be undone.
    - `velocity`: the velocity in floating point, which derivatives pass through.
    - `count`: the number of steps taken.
    - `in_range`: whether all fixed-point numbers have been in range so far.
    """

    exact: Exact
    bound: IntScalar
    excess: FloatScalar
    words: list[jax.Array] | None
    velocity: list[jax.Array]
    count: IntScalar
    in_range: BoolScalar


class AbstractExactMomentum(AbstractIterativeSolver):
    """A solver whose params and velocities are integers, so that its steps can be undone.

    Here is what becomes of the integers; where learning rates, momenta and gradients come
    from is for the solver to say. The remainders that a momentum discards are kept as
    digits (see `_lossless.py`), and words are taken off these where they become too long.
    """

    min_momentum: eqx.AbstractVar[float]
    fraction_bits: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def resolved(self, rates: Any, momenta: Any) -> "AbstractExactMomentum":
        """The same solver with learning rates and momenta that are known.

        **Arguments:**

        - `rates`, `momenta`: arrays of shape `(num_steps,)`; `None` for a solver whose
            `step` is not called.
        """

    @_promoting
    def begin(self, params: Vector) -> tuple[Exact, BoolScalar]:
        """The exact state before the first step, and whether it is in range.

        **Arguments:**

        - `params`: the trainable part of the initial params.
        """
        leaves = jax.tree.leaves(params)
        position, inside = _unzip(encode(leaf, self.fraction_bits) for leaf in leaves)
        exact = Exact(
            position=position,
            velocity=[jnp.zeros_like(number) for number in position],
            digit=[jnp.zeros(number.shape, jnp.uint32) for number in position],
            height=jnp.zeros((), jnp.int32),
        )
        return exact, jnp.all(jnp.stack(inside))

    @_promoting
    def recording(self, state: ReversibleState) -> ReversibleState:
        """The state with memory for the words of all steps.

        **Arguments:**

        - `state`: what `init` returned.
        """
        # One more, because a word is written at every step and counts where the digits
        # are shortened; and one for schedules whose bounds are rounded differently.
        rows = num_words(self.num_steps, self._least) + 2
        words = [jnp.zeros((rows, *a.shape), jnp.uint16) for a in state.exact.digit]
        return eqx.tree_at(lambda s: s.words, state, words, is_leaf=lambda x: x is None)

    @_promoting
    def factors(self, momenta: jax.Array) -> tuple[jax.Array, jax.Array, FloatScalar]:
        """The multipliers of the velocities, and the bounds on the digits before that.

        **Arguments:**

        - `momenta`: the momenta of all steps, `(num_steps,)`.

        **Returns:**

        The numerators and the bounds of all steps, `(num_steps,)` each, which no data
        enters; and the bits that are stored for each step and parameter: those of the
        words, and the logarithm of the last bound.
        """

        def advance(carry, momentum):
            bound, excess, height = carry
            numerator, excess, _ = self._rounded(momentum, excess)
            full, new = shortened(Factor(numerator, bound), self._limit)
            return (new, excess, height + full), (numerator, bound)

        start = (
            jnp.ones((), jnp.uint32),
            jnp.zeros((), jnp.float32),
            jnp.zeros((), jnp.int32),
        )
        momenta = jax.lax.stop_gradient(momenta)
        (last, _, height), (numerators, bounds) = jax.lax.scan(advance, start, momenta)
        bits = BITS * height.astype(jnp.float32) + jnp.log2(last.astype(jnp.float32))
        return numerators, bounds, bits / self.num_steps

    @_promoting
    def fraction(self, numerator: IntScalar, momentum: FloatScalar) -> FloatScalar:
        """The momentum that a step takes, with the derivative of the one asked for.

        **Arguments:**

        - `numerator`: in multiples of 2**-16.
        - `momentum`: what it is a rounding of.
        """
        return straight(numerator.astype(momentum.dtype) / ONE, momentum)

    @_promoting
    def params_at(self, exact: Exact, like: Vector) -> Vector:
        """The params at an exact position, with the derivative of `like`.

        **Arguments:**

        - `exact`: integers.
        - `like`: a vector with the structure and the dtypes of the params.
        """
        leaves, structure = jax.tree.flatten(like)
        leaves = [
            straight(decode(number, p.dtype, self.fraction_bits).astype(p.dtype), p)
            for number, p in zip(exact.position, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    @_promoting
    def velocity_at(self, exact: Exact, like: Vector) -> list[jax.Array]:
        """The velocity, in float32 or float64.

        **Arguments:**

        - `exact`: integers.
        - `like`: a vector with the dtypes of the params.
        """
        return [
            decode(number, p.dtype, self.fraction_bits)
            for number, p in zip(exact.velocity, jax.tree.leaves(like), strict=True)
        ]

    @_promoting
    def position_before(self, exact: Exact, rate: FloatScalar) -> Exact:
        """Undo the second half of a step, the change of the position.

        **Arguments:**

        - `exact`: integers after the step.
        - `rate`: the learning rate of the step.
        """
        position = [
            x + _change(v, rate)[0]
            for x, v in zip(exact.position, exact.velocity, strict=True)
        ]
        return eqx.tree_at(lambda e: e.position, exact, position)

    @_promoting
    def velocity_before(
        self,
        exact: Exact,
        words: list[jax.Array],
        gradient: Vector,
        numerator: IntScalar,
        bound: IntScalar,
    ) -> Exact:
        """Undo the first half of a step, the change of the velocity.

        **Arguments:**

        - `exact`: integers, with the position before the step.
        - `words`: all words that were taken off.
        - `gradient`: the gradient there.
        - `numerator`, `bound`: those of the step.
        """
        factor = Factor(numerator, bound)
        full, _ = shortened(factor, self._limit)
        height = exact.height - full
        gains = [encode(leaf, self.fraction_bits)[0] for leaf in jax.tree.leaves(gradient)]
        velocity, digit = _unzip(
            divide(v - gain, jnp.where(full, (d << BITS) | _row(w, height), d), factor)
            for v, gain, d, w in zip(exact.velocity, gains, exact.digit, words, strict=True)
        )
        return Exact(exact.position, velocity, digit, height)

    @property
    def _least(self) -> int:
        return math.floor(self.min_momentum * ONE)

    @property
    def _limit(self) -> int:
        return largest_bound(self._least)

    @_promoting
    def _rounded(
        self, momentum: FloatScalar, excess: FloatScalar
    ) -> tuple[IntScalar, FloatScalar, BoolScalar]:
        """The momentum in multiples of 2**-16, what the next one is to make up for, and
        whether it is in its range.

        Always rounded the same way, a momentum of 0.9 would be 6e-6 too small, and what
        it adds up to 6e-5. Products with a power of two are exact, so that this comes to
        the same wherever it is compiled.
        """
        momentum = jax.lax.stop_gradient(momentum).astype(jnp.float32)
        allowed = (momentum * ONE >= self._least) & (momentum < 1)
        momentum = jnp.where(allowed, momentum, self._least / ONE)
        asked = momentum * ONE + excess
        numerator = jnp.clip(jnp.round(asked), self._least, ONE)
        return numerator.astype(jnp.uint32), asked - numerator, allowed

    @_promoting
    def _advance(
        self,
        state: ReversibleState,
        numerator: IntScalar,
        rate: FloatScalar,
        gradient: list[jax.Array],
    ) -> ReversibleState:
        """One step in integers."""
        exact = state.exact
        factor = Factor(numerator, state.bound)
        full, bound = shortened(factor, self._limit)
        gains, known = _unzip(encode(leaf, self.fraction_bits) for leaf in gradient)
        products, digit = _unzip(
            multiply(v, d, factor) for v, d in zip(exact.velocity, exact.digit, strict=True)
        )
        words = state.words
        if words is not None:
            # Written at every step, without a branch, and kept where digits are full.
            words = [
                jax.lax.dynamic_update_index_in_dim(
                    w, d.astype(jnp.uint16), exact.height, 0
                )
                for w, d in zip(words, digit, strict=True)
            ]
        digit = [jnp.where(full, d >> BITS, d) for d in digit]
        velocity, held = _unzip(
            bounded(product + gain) for product, gain in zip(products, gains, strict=True)
        )
        changes, small = _unzip(_change(v, rate) for v in velocity)
        position, stays = _unzip(
            bounded(x - change) for x, change in zip(exact.position, changes, strict=True)
        )
        inside = jnp.all(jnp.stack([*known, *held, *small, *stays, state.in_range]))
        exact = Exact(position, velocity, digit, exact.height + full)
        count = state.count + 1
        return ReversibleState(
            exact, bound, state.excess, words, state.velocity, count, inside
        )


def _change(velocity: jax.Array, rate: FloatScalar) -> tuple[jax.Array, BoolScalar]:
    """The change of the position."""
    real = velocity.astype(jnp.float64 if velocity.dtype == jnp.int64 else jnp.float32)
    return to_integer(rate.astype(real.dtype) * real)


def _row(words: jax.Array, height: IntScalar) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(words, height, keepdims=False)
    return row.astype(jnp.uint32)


def _unzip(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)
