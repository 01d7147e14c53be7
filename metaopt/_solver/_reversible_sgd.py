"""Stochastic gradient descent with momentum whose steps can be undone exactly."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import split_trainable, tree_all_finite, tree_dtype
from .._core._types import Hyper
from .._core._validate import check_count
from .._problem import AbstractStatePolicy
from ._base import StepOutput
from ._common import check_state_policy, problem_optimality
from ._exact_momentum import AbstractExactMomentum, ReversibleState
from ._fixed_point_numbers import straight, wide
from ._reversible import AbstractReversibleSolver, MomentumRun


Schedule = float | jax.Array | np.ndarray | Callable[[Hyper], Any]
"""A number, an array `(num_steps,)`, or a function of `hyper` that returns either."""

DEFAULT_MIN_MOMENTUM = 0.5
SMALLEST_MIN_MOMENTUM = 0.1


class ReversibleSGD(AbstractExactMomentum, AbstractReversibleSolver):
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
        if not problem.has_loss:
            raise ValueError(
                f"`ReversibleSGD` minimises a loss, and `{type(problem).__name__}` has "
                "none. Use `metaopt.Descent`, which follows the field of any problem."
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
            velocity=[jnp.zeros(leaf.shape, wide(leaf.dtype)) for leaf in leaves],
            count=jnp.zeros((), jnp.int32),
            in_range=inside,
        )

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        state: ReversibleState = solver_state
        trainable, static = split_trainable(params)
        point = self.params_at(state.exact, trainable)
        full = eqx.combine(point, static)
        gradient, out = problem.field(full, hyper, batch, key, model_state)
        rate, momentum = (
            jax.lax.dynamic_index_in_dim(values, state.count, keepdims=False)
            for values in self.settings(hyper)
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
        # The next line changes no value: it is the step in real numbers, which gives the
        # derivative.
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

    def reversible_run(self, loop, hyper, model_state, inputs, max_drift):
        return MomentumRun(self, loop, hyper, model_state, inputs)

    def settings(self, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
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
            values = values.astype(tree_dtype(values))
            out.append(jnp.broadcast_to(values, (self.num_steps,)))
        return out[0], out[1]

    def resolved(self, rates, momenta):
        where = lambda solver: (solver.learning_rate, solver.momentum)
        return eqx.tree_at(where, self, (rates, momenta))

    def _check_shape(self, values: Any, name: str) -> None:
        shape = jnp.shape(values)
        if shape not in ((), (self.num_steps,)):
            raise ValueError(
                f"`{name}` has shape {shape}. It must be a number, or an array of shape "
                f"({self.num_steps},), with a value for each step."
            )


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
