"""Derivatives that explode along the path of an inner solver."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import mask_result, RESULTS
from .._core._types import FloatScalar, Vector
from .._report import number


# The effect of one rounding, relative to the outer loss or to its change over the path,
# and the growth of the derivative, above which it explodes.
_EFFECT, _GROWTH = 1e-3, 1e2

# The same relative to what the outer loss changes by if every param of the end changes by
# all of its size. An outer loss that is small, or does not change, is no explosion.
_EFFECT_OF_SIZE = 1e-4


class Growth(eqx.Module):
    """The growth of a derivative along the path of an inner solver.

    **Attributes:**

    - `factor`: the largest norm of the derivative of the outer loss in the params along
        the path, relative to that at its end.
    - `rounding_effect`: the change of the outer loss when the params are rounded once,
        at the step of the path where that changes it the most.
    """

    factor: FloatScalar
    rounding_effect: FloatScalar

    def rows(self) -> list[tuple[str, str]]:
        """The rows of the printed table."""
        return [
            ("growth along the path", number(self.factor)),
            ("effect of one rounding", number(self.rounding_effect)),
        ]

    def scalars(self) -> dict[str, jax.Array]:
        """The columns of the history."""
        return {"growth": self.factor, "rounding_effect": self.rounding_effect}


def judge_path(
    measured: jax.Array,
    value: FloatScalar,
    value_at_start: Callable[[], FloatScalar],
    params: Vector,
) -> tuple[Growth, RESULTS]:
    """Judge from the readings of a gauge whether the derivative explodes.

    **Arguments:**

    - `measured`: see `metaopt._solver._gauge.measured`.
    - `value`: the outer loss.
    - `value_at_start`: gives it at the initial params. An outer loss can have a constant
        that says nothing, and its change over the path has none. It is evaluated where the
        rest looks like an explosion.
    - `params`: for their dtypes.
    """
    rounding, last_rounding, largest, last = measured
    growth = jnp.where(last > 0, largest / jnp.where(last > 0, last, 1), 1)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
    suspect = (growth > _GROWTH) & (rounding * eps > _EFFECT_OF_SIZE * last_rounding)
    value = jax.lax.stop_gradient(value)
    start = jax.lax.cond(
        suspect, lambda: jax.lax.stop_gradient(value_at_start()), lambda: value
    )
    change = jnp.where(jnp.isfinite(start), jnp.abs(value - start), jnp.inf)
    exploded = suspect & (rounding > _EFFECT * jnp.minimum(jnp.abs(value), change))
    return Growth(growth, rounding), mask_result(exploded, RESULTS.path_exploded)
