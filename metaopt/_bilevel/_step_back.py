"""An outer optimizer that turns back where hypergradients explode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._core._tree import tree_norm, tree_scale, tree_sub, tree_where, tree_zeros_like
from .._core._types import FloatScalar, PyTree
from .._core._validate import check_kind


_GROWTH = 1.1  # of the steps, by each hypergradient that is used


class StepBackState(NamedTuple):
    """The state of the optimizer within, the mean of the variables that were good, and the
    part of its steps that is taken."""

    inner: PyTree
    mean: PyTree
    part: FloatScalar


def step_back(
    outer: optax.GradientTransformation,
    max_norm: float,
    *,
    memory: float = 0.8,
    factor: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """An outer optimizer that turns back where the hypergradient explodes.

    Tuned learning rates grow until training is at the edge of what is stable. Beyond it
    the derivative through training is large and has no direction: an optimizer that clips
    it wanders on, and seldom comes back. Here such a hypergradient is not used. The outer
    variables go back to the running mean of those at which it was small enough, the state
    of `outer` stays as it was, and its steps are shortened; they grow again by a tenth with
    each hypergradient that is used.

    ```python
    import metaopt as mo
    import optax

    outer = mo.step_back(optax.adam(0.05), max_norm=1.0)
    ```

    **Arguments:**

    - `outer`: the optimizer for hypergradients that have not exploded.
    - `max_norm`: the Euclidean norm of the hypergradient over all outer variables, above
        which it has exploded: a few times that of the first steps, which the column
        `hypergradient_norm` of a history has. If even the first is above, no step is ever
        taken, and the printed solution says so.
    - `memory`: the weight of the past in the running mean, at least 0 and less than 1.
    - `factor`: by which the steps are shortened, above 0 and at most 1.

    **Returns:**

    A transform of optax.

    **Raises:**

    `ValueError` for something else than a transform, and for numbers out of range.
    """
    check_kind(outer, optax.GradientTransformation, "outer", "optax.adam(0.01)")
    _check_number(max_norm, "max_norm", lambda x: x > 0, "positive")
    _check_number(memory, "memory", lambda x: 0 <= x < 1, "at least 0 and less than 1")
    _check_number(factor, "factor", lambda x: 0 < x <= 1, "above 0 and at most 1")
    within = optax.with_extra_args_support(outer)

    def init(params: PyTree) -> StepBackState:
        return StepBackState(within.init(params), params, jnp.ones(()))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, StepBackState]:
        if params is None:
            raise ValueError("`step_back` needs the variables: `update(..., params)`.")
        good = tree_norm(updates) <= max_norm  # false for NaN
        # Sums and products with NaN would be NaN: they are left out before.
        usable = tree_where(good, updates, tree_zeros_like(updates))
        step, inner = within.update(usable, state.inner, params, **extra)
        mix = lambda mean, x: (memory * mean + (1 - memory) * x).astype(mean.dtype)
        mean = jax.tree.map(mix, state.mean, params)
        part = jnp.where(good, jnp.minimum(_GROWTH * state.part, 1), factor * state.part)
        taken = tree_where(good, tree_scale(state.part, step), tree_sub(state.mean, params))
        new, old = (
            StepBackState(inner, mean, part),
            StepBackState(state.inner, state.mean, part),
        )
        return taken, tree_where(good, new, old)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_number(
    value: Any, name: str, is_good: Callable[[float], bool], wanted: str
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not is_good(value):
        raise ValueError(f"`{name}` must be a number, {wanted}; got {value!r}.")
