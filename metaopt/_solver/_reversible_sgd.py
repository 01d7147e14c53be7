"""Stochastic gradient descent with momentum whose steps can be undone exactly."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._model_state import AbstractStatePolicy
from .._problem import AbstractInnerProblem, AbstractProblem, Evaluation
from .._results import first_failure, mask_result, RESULTS
from .._tree import split_trainable, tree_all_finite
from .._types import (
    Batch,
    BoolScalar,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._validate import check_count
from ._base import AbstractIterativeSolver, StepOutput
from ._common import check_state_policy, problem_optimality
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


Schedule = float | jax.Array | np.ndarray | Callable[[Hyper], Any]
"""A number, an array `(num_steps,)`, or a function of `hyper` that returns either."""

DEFAULT_MIN_MOMENTUM = 0.5
SMALLEST_MIN_MOMENTUM = 0.1


class Exact(eqx.Module):
    """Where the solver is, to the last bit: a list of integer arrays for each.

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
    """What one step hands to the next, beside the params.

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


class ReversibleSGD(AbstractIterativeSolver):
    r"""Gradient descent with momentum, in integers, so that every step can be undone.

    With [`metaopt.ReversibleAdjoint`][] it gives exact hypergradients of long runs: the
    params, the momenta and $\log_2(1 / momentum)$ bits for each step and parameter are
    all that is kept, 0.15 bits at a momentum of 0.9 where
    [`metaopt.UnrolledAdjoint`][] keeps 64 or more. Other adjoints differentiate it like
    any solver. Use it where training is long, its learning rates, momenta or initial
    params are tuned, and memory is short. Not for short runs, for which
    [`metaopt.Descent`][] costs less; nor for other optimizers than this one; nor for
    gradients much below 1e-6.

    The steps are those of `optax.sgd(learning_rate, momentum)`,

    $$
    v' = momentum \cdot v + \nabla loss(params), \qquad
    params' = params - learning\_rate \cdot v' ,
    $$

    in fixed point: params, velocities, gradients and changes of params are multiples of
    $2^{-22}$ (2.4e-7) below 256, in float64 of $2^{-48}$ below 16,384, and each step
    rounds by that much. Momenta are multiples of $2^{-16}$; what one is rounded by, the
    next makes up for. Leaving the range is a failure of the solve, and so is a momentum
    outside of `[min_momentum, 1)`. Derivatives take rounding as the identity: they are
    those of the equations above in real numbers, at the points visited. Params of 16
    bits are kept with all of their fixed-point digits, and the loss sees them rounded to
    their dtype.

    ```python
    import jax.numpy as jnp
    import metaopt as mo

    mo.ReversibleSGD(0.1, 0.9, num_steps=1000)
    mo.ReversibleSGD(  # a learning rate for each step, and a momentum, to be tuned
        lambda hyper: jnp.exp(hyper["log_rates"]),
        lambda hyper: hyper["momentum"],
        num_steps=1000,
        min_momentum=0.8,
    )
    ```

    **Arguments:**

    - `learning_rate`, `momentum`: each a number, an array `(num_steps,)` with a value
        for each step, or a function of `hyper` that returns either.
    - `num_steps`: the number of steps.
    - `min_momentum`: the smallest momentum that will be met, at least 0.1. It decides
        how much memory is set aside, $\log_2(1 / min\_momentum)$ bits for each step and
        parameter. By default the smallest of `momentum` where its values are known, else
        0.5.
    - `fraction_bits`: how many binary digits there are behind the point; by default 22,
        and 48 for float64. More are more accurate, and halve the range each.
    - `state_policy`: what becomes of model state, if the problem has any.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a loss.

    ??? cite "Source"

        Maclaurin, Duvenaud, Adams: *Gradient-based hyperparameter optimization through
        reversible learning*, 2015. Different here: the momentum multiplies to the
        nearest integer but one instead of up to its numerator; gradients are not scaled
        by `1 - momentum`.
    """

    learning_rate: Schedule
    momentum: Schedule
    num_steps: int = eqx.field(static=True)
    min_momentum: float = eqx.field(static=True)
    fraction_bits: int | None = eqx.field(static=True)
    state_policy: AbstractStatePolicy | None

    def __init__(
        self,
        learning_rate: Schedule,
        momentum: Schedule,
        num_steps: int,
        *,
        min_momentum: float | None = None,
        fraction_bits: int | None = None,
        state_policy: AbstractStatePolicy | None = None,
    ):
        self.learning_rate = _as_schedule(learning_rate, "learning_rate")
        self.momentum = _as_schedule(momentum, "momentum")
        if min_momentum is None:
            known = _values(self.momentum)
            min_momentum = DEFAULT_MIN_MOMENTUM
            if known is not None and known.size > 0:
                min_momentum = float(known.min())
        self.num_steps = num_steps
        self.min_momentum = min_momentum
        self.fraction_bits = fraction_bits
        self.state_policy = state_policy

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        for name, schedule in (
            ("learning_rate", self.learning_rate),
            ("momentum", self.momentum),
        ):
            if not callable(schedule):
                self._check_shape(schedule, name)
        least = self.min_momentum
        if isinstance(least, bool) or not isinstance(least, (int, float, np.floating)):
            raise ValueError(f"`min_momentum` must be a number; got {least!r}.")
        momenta = _values(self.momentum)
        if momenta is not None and not np.all((momenta >= 0) & (momenta < 1)):
            raise ValueError(f"`momentum` must lie in [0, 1); got {self.momentum}.")
        if not SMALLEST_MIN_MOMENTUM <= least < 1:
            raise ValueError(
                f"The smallest momentum must lie in [{SMALLEST_MIN_MOMENTUM}, 1); got "
                f"{least}. Steps with less momentum forget so much that undoing them "
                "saves no memory: use `metaopt.Descent` and `metaopt.UnrolledAdjoint`."
            )
        if momenta is not None and not np.all(momenta >= least):
            raise ValueError(
                f"`min_momentum` is {least}, and `momentum` is {self.momentum}. Lower "
                "`min_momentum`, or leave it out."
            )
        if self.fraction_bits is not None:
            check_count(self.fraction_bits, "fraction_bits")

    @property
    def stops_early(self):
        return False

    def check(self, problem, data):
        if not isinstance(problem, AbstractInnerProblem):
            raise ValueError(
                f"`ReversibleSGD` minimises a loss, and `{type(problem).__name__}` has "
                "none. Use `metaopt.Picard` or `metaopt.OptimistixSolver`."
            )
        check_state_policy(self, problem)
        data.check(self.num_steps)

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def init(self, problem, params, hyper):
        exact, inside = self.begin(params)
        leaves = jax.tree.leaves(params)
        return ReversibleState(
            exact=exact,
            bound=jnp.ones((), jnp.uint32),
            excess=jnp.zeros((), jnp.float32),
            words=None,
            velocity=[jnp.zeros(leaf.shape, _wide(leaf.dtype)) for leaf in leaves],
            count=jnp.zeros((), jnp.int32),
            in_range=inside,
        )

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        state: ReversibleState = solver_state
        trainable, static = split_trainable(params)
        point = self.params_at(state.exact, trainable)
        out, gradient = self.evaluate(
            problem, eqx.combine(point, static), hyper, batch, key, model_state
        )
        rate, momentum = (
            jax.lax.dynamic_index_in_dim(values, state.count, keepdims=False)
            for values in self.schedules(hyper)
        )
        numerator, excess, allowed = self._rounded(momentum, state.excess)
        state = self._advance(state, numerator, rate, jax.tree.leaves(gradient))
        result = first_failure(
            mask_result(
                jnp.logical_not(tree_all_finite(gradient)), RESULTS.inner_nonfinite
            ),
            mask_result(jnp.logical_not(allowed), RESULTS.inner_momentum),
            mask_result(jnp.logical_not(state.in_range), RESULTS.inner_out_of_range),
        )
        # What follows changes no value: it is the step in real numbers, whose derivative
        # is that of the step.
        momentum = self.fraction(numerator, momentum)
        leaves, structure = jax.tree.flatten(point)
        velocity = [
            straight(new, momentum.astype(v.dtype) * v + g.astype(v.dtype))
            for new, v, g in zip(
                self.velocity_at(state.exact, leaves),
                state.velocity,
                jax.tree.leaves(gradient),
                strict=True,
            )
        ]
        moved = [
            (p.astype(v.dtype) - rate.astype(v.dtype) * v).astype(p.dtype)
            for p, v in zip(leaves, velocity, strict=True)
        ]
        point = self.params_at(state.exact, jax.tree.unflatten(structure, moved))
        where = lambda state: (state.velocity, state.excess)
        state = eqx.tree_at(where, state, (velocity, excess))
        output = StepOutput(out.value, None, out.state, out.aux, result)
        return eqx.combine(point, static), state, output

    #
    # What the adjoint that undoes the steps needs besides
    #

    def schedules(self, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
        """The learning rates and the momenta of all steps, `(num_steps,)` each.

        **Arguments:**

        - `hyper`: the outer variables.

        **Returns:**

        Two floating-point arrays.
        """
        out = []
        for name in ("learning_rate", "momentum"):
            schedule: Any = {
                "learning_rate": self.learning_rate,
                "momentum": self.momentum,
            }[name]
            values = schedule(hyper) if callable(schedule) else schedule
            values = jnp.asarray(values)
            self._check_shape(values, name)
            values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
            out.append(jnp.broadcast_to(values, (self.num_steps,)))
        return out[0], out[1]

    def resolved(self, rates: Any, momenta: Any) -> "ReversibleSGD":
        """The same solver with learning rates and momenta that are known.

        **Arguments:**

        - `rates`, `momenta`: arrays of shape `(num_steps,)`; `None` for a solver whose
            `step` is not called.
        """
        where = lambda solver: (solver.learning_rate, solver.momentum)
        return eqx.tree_at(where, self, (rates, momenta))

    def begin(self, params: Vector) -> tuple[Exact, BoolScalar]:
        """Where the first step starts, to the last bit, and whether that is in range.

        **Arguments:**

        - `params`: the trainable part of the initial params.
        """
        leaves = jax.tree.leaves(params)
        position, inside = _unzip(self._encode(leaf) for leaf in leaves)
        exact = Exact(
            position=position,
            velocity=[jnp.zeros_like(number) for number in position],
            digit=[jnp.zeros(number.shape, jnp.uint32) for number in position],
            height=jnp.zeros((), jnp.int32),
        )
        return exact, jnp.all(jnp.stack(inside))

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

    def factors(self, momenta: jax.Array) -> tuple[jax.Array, jax.Array, FloatScalar]:
        """What multiplies the velocities, and what the digits are below before that.

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

    def evaluate(
        self,
        problem: AbstractProblem,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key,
        model_state: ModelState,
    ) -> tuple[Evaluation, Vector]:
        """The loss and its gradient, by one function in both directions.

        **Arguments:**

        - `problem`, `params`, `hyper`, `batch`, `key`, `model_state`: as for `step`.

        **Returns:**

        A [`metaopt.Evaluation`][] and the gradient.
        """
        trainable, static = split_trainable(params)

        def loss(trainable):
            full = eqx.combine(trainable, static)
            out = problem.evaluate(full, hyper, batch, key, model_state)
            return out.value, out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        return out, gradient

    def fraction(self, numerator: IntScalar, momentum: FloatScalar) -> FloatScalar:
        """The momentum that a step takes, with the derivative of the one asked for.

        **Arguments:**

        - `numerator`: in multiples of 2**-16.
        - `momentum`: what it is a rounding of.
        """
        return straight(numerator.astype(momentum.dtype) / ONE, momentum)

    def params_at(self, exact: Exact, like: Vector) -> Vector:
        """The params at an exact position, with the derivative of `like`.

        **Arguments:**

        - `exact`: integers.
        - `like`: a vector with the structure and the dtypes of the params.
        """
        leaves, structure = jax.tree.flatten(like)
        leaves = [
            straight(self._decode(number, p.dtype).astype(p.dtype), p)
            for number, p in zip(exact.position, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    def velocity_at(self, exact: Exact, like: Vector) -> list[jax.Array]:
        """The velocity, in float32 or float64.

        **Arguments:**

        - `exact`: integers.
        - `like`: a vector with the dtypes of the params.
        """
        return [
            self._decode(number, p.dtype)
            for number, p in zip(exact.velocity, jax.tree.leaves(like), strict=True)
        ]

    def position_before(self, exact: Exact, rate: FloatScalar) -> Exact:
        """Undoes the second half of a step, the change of the position.

        **Arguments:**

        - `exact`: integers after the step.
        - `rate`: the learning rate of the step.
        """
        position = [
            x + _change(v, rate)[0]
            for x, v in zip(exact.position, exact.velocity, strict=True)
        ]
        return eqx.tree_at(lambda e: e.position, exact, position)

    def velocity_before(
        self,
        exact: Exact,
        words: list[jax.Array],
        gradient: Vector,
        numerator: IntScalar,
        bound: IntScalar,
    ) -> Exact:
        """Undoes the first half of a step, the change of the velocity.

        **Arguments:**

        - `exact`: integers, with the position before the step.
        - `words`: all words that were taken off.
        - `gradient`: the gradient there.
        - `numerator`, `bound`: those of the step.
        """
        factor = Factor(numerator, bound)
        full, _ = shortened(factor, self._limit)
        height = exact.height - full
        gains = [self._encode(leaf)[0] for leaf in jax.tree.leaves(gradient)]
        velocity, digit = _unzip(
            divide(v - gain, jnp.where(full, (d << BITS) | _row(w, height), d), factor)
            for v, gain, d, w in zip(exact.velocity, gains, exact.digit, words, strict=True)
        )
        return Exact(exact.position, velocity, digit, height)

    #
    # Fixed-point numbers
    #

    @property
    def _least(self) -> int:
        return math.floor(self.min_momentum * ONE)

    @property
    def _limit(self) -> int:
        return largest_bound(self._least)

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

    def _encode(self, x: jax.Array) -> tuple[jax.Array, BoolScalar]:
        """`x` as a fixed-point number, and whether it has one."""
        return _to_integer(x.astype(_wide(x.dtype)) * self._unit(x.dtype))

    def _decode(self, number: jax.Array, dtype: Any) -> jax.Array:
        return number.astype(_wide(dtype)) / self._unit(dtype)

    def _unit(self, dtype: Any) -> float:
        bits = self.fraction_bits
        double = _wide(dtype) == jnp.float64
        if bits is None:
            bits = 48 if double else 22
        if bits > (60 if double else 29):
            raise ValueError(
                f"`fraction_bits` is {bits}, which leaves no range for params of dtype "
                f"{dtype}. At most 29 fit, and 60 for float64."
            )
        return float(2**bits)

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
        gains, known = _unzip(self._encode(leaf) for leaf in gradient)
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
        velocity, bounded = _unzip(
            _bounded(product + gain) for product, gain in zip(products, gains, strict=True)
        )
        changes, small = _unzip(_change(v, rate) for v in velocity)
        position, stays = _unzip(
            _bounded(x - change) for x, change in zip(exact.position, changes, strict=True)
        )
        inside = jnp.all(jnp.stack([*known, *bounded, *small, *stays, state.in_range]))
        exact = Exact(position, velocity, digit, exact.height + full)
        count = state.count + 1
        return ReversibleState(
            exact, bound, state.excess, words, state.velocity, count, inside
        )

    def _check_shape(self, values: Any, name: str) -> None:
        shape = jnp.shape(values)
        if shape not in ((), (self.num_steps,)):
            raise ValueError(
                f"`{name}` has shape {shape}. It must be a number, or an array of shape "
                f"({self.num_steps},), with a value for each step."
            )


@jax.custom_jvp
def straight(value: jax.Array, real: jax.Array) -> jax.Array:
    """`value`, with the derivative of `real`, of which it is a rounding."""
    return value


@straight.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _largest(dtype: Any) -> int:
    """What fixed-point numbers are below: the sum of two is an integer."""
    return 2**62 if dtype == jnp.int64 else 2**30


def _to_integer(x: jax.Array) -> tuple[jax.Array, BoolScalar]:
    """The nearest integer, and whether all are in range."""
    dtype = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    largest = _largest(dtype)
    inside = jnp.abs(x) < largest  # and not NaN
    x = jnp.where(inside, jnp.round(x), jnp.zeros_like(x))
    return x.astype(dtype), jnp.all(inside)


def _bounded(x: jax.Array) -> tuple[jax.Array, BoolScalar]:
    """`x` held within the range, and whether it is in range."""
    largest = _largest(x.dtype)
    return jnp.clip(x, -largest, largest), jnp.all(jnp.abs(x) < largest)


def _change(velocity: jax.Array, rate: FloatScalar) -> tuple[jax.Array, BoolScalar]:
    """How far the position moves."""
    real = velocity.astype(jnp.float64 if velocity.dtype == jnp.int64 else jnp.float32)
    return _to_integer(rate.astype(real.dtype) * real)


def _row(words: jax.Array, height: IntScalar) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(words, height, keepdims=False)
    return row.astype(jnp.uint32)


def _unzip(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def _values(schedule: Any) -> np.ndarray | None:
    """The numbers of a schedule, where they are known."""
    if callable(schedule) or isinstance(schedule, jax.core.Tracer):
        return None
    return np.asarray(schedule)


def _as_schedule(schedule: Any, name: str) -> Any:
    numbers = (float, int, np.ndarray, np.generic, jax.Array)
    if isinstance(schedule, bool) or not (
        callable(schedule) or isinstance(schedule, numbers)
    ):
        raise ValueError(
            f"`{name}` must be a number, an array or a function of `hyper`; got "
            f"{schedule!r}."
        )
    if isinstance(schedule, np.ndarray | np.generic):
        return jnp.asarray(schedule)
    return schedule
