"""Schedules over the steps of an optimizer, of a few numbers that can be tuned."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._core._tree import tree_widened
from .._core._types import FloatScalar, IntScalar
from .._core._validate import check_count, check_kind
from ._base import AbstractHyper
from ._interval import Interval
from ._positive import Positive


class PiecewiseLinear(eqx.Module):
    """A schedule that is linear between equally spaced knots, which are tuned.

    Call it with the number of a step, as optax does with a learning rate. With as many
    knots as steps each step has a number of its own.

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo
        import optax

        rate = mo.hyper.PiecewiseLinear(mo.hyper.Positive(jnp.full(5, 0.1)), 100)
        inner = mo.Descent(lambda hyper: optax.sgd(hyper["rate"]), num_steps=100)
        ```

    **Arguments:**

    - `knots`: a hyperparameter whose `value` has shape `(num_knots,)`, from the first step
        to the last.
    - `num_steps`: the number of steps; at later ones the schedule stays at the last knot.

    **Raises:**

    `ValueError` for knots of another kind or shape.
    """

    knots: AbstractHyper
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_kind(self.knots, AbstractHyper, "knots", "metaopt.hyper.Positive(...)")
        check_count(self.num_steps, "num_steps")
        shape = self.knots.raw.shape
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(f"`knots` must have shape (num_knots,); got {shape}.")

    def __repr__(self) -> str:
        return f"PiecewiseLinear({self.knots!r}, num_steps={self.num_steps})"

    def __call__(self, step: IntScalar) -> FloatScalar:
        """The number at a step.

        **Arguments:**

        - `step`: the number of the step, an array of ints; the first is 0.

        **Returns:**

        An array of the shape of `step`.
        """
        knots = self.knots.value
        # Half precision cannot count the steps.
        wide = tree_widened(knots)
        places = jnp.linspace(0, self.num_steps - 1, knots.size, dtype=wide.dtype)
        out = jnp.interp(jnp.asarray(step, wide.dtype), places, wide)
        return out.astype(knots.dtype)

    @property
    def value(self) -> Float[Array, " num_steps"]:
        """The numbers at all steps, to be printed or drawn."""
        return self(jnp.arange(self.num_steps))


class WarmupCosine(eqx.Module):
    r"""A linear rise from 0 to a peak, and half a cosine down to a share of it; all three
    are tuned.

    Call it with the number of a step, as optax does with a learning rate. At step $t$ of
    $T$, with $w$ the share of the steps that rise and $e$ that of the peak at the end, it
    is $peak \min(1, \frac{t + 1}{w T})$ times $e + (1 - e) \frac{1 + \cos \pi x}{2}$ with
    $x = \max(0, \frac{t - w T}{T - w T})$.

    !!! example

        ```python
        import metaopt as mo
        import optax

        rate = mo.hyper.WarmupCosine(0.1, num_steps=100)
        inner = mo.Descent(lambda hyper: optax.sgd(hyper["rate"]), num_steps=100)
        ```

    **Arguments:**

    - `peak`: the initial value of the peak, more than 0.
    - `num_steps`: the number of steps; at later ones the schedule stays where it ends.
    - `warmup`: the initial share of the steps that rise, between 0 and 1.
    - `end`: the initial share of the peak at the end, between 0 and 1.

    **Raises:**

    `ValueError` for numbers out of their range.
    """

    peak: Positive
    warmup: Interval
    end: Interval
    num_steps: int = eqx.field(static=True)

    def __init__(
        self,
        peak: ArrayLike,
        num_steps: int,
        *,
        warmup: ArrayLike = 0.1,
        end: ArrayLike = 0.1,
    ):
        check_count(num_steps, "num_steps")
        self.peak = Positive(peak)
        self.warmup, self.end = Interval(warmup, 0, 1), Interval(end, 0, 1)
        self.num_steps = num_steps

    def __repr__(self) -> str:
        names = "peak", "warmup", "end", "num_steps"
        parts = ", ".join(f"{name}={vars(self)[name]!r}" for name in names)
        return f"WarmupCosine({parts})"

    def __call__(self, step: IntScalar) -> FloatScalar:
        """The number at a step.

        **Arguments:**

        - `step`: the number of the step, an array of ints; the first is 0.

        **Returns:**

        An array of the shape of `step`.
        """
        dtype = self.peak.raw.dtype
        parts = self.peak.value, self.end.value, self.warmup.value
        peak, end, warmup = map(tree_widened, parts)
        rising = warmup * self.num_steps
        step = jnp.minimum(jnp.asarray(step, peak.dtype), self.num_steps - 1)
        rise = jnp.minimum((step + 1) / rising, 1)
        falling = jnp.maximum(self.num_steps - rising, 1e-3)
        share = jnp.clip((step - rising) / falling, 0, 1)
        fall = end + (1 - end) * (1 + jnp.cos(jnp.pi * share)) / 2
        return (peak * rise * fall).astype(dtype)

    @property
    def value(self) -> Float[Array, " num_steps"]:
        """The numbers at all steps, to be printed or drawn."""
        return self(jnp.arange(self.num_steps))
