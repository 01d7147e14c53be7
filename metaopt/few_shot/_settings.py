"""Settings of the adaptation that are learned with the model."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._core._types import Params
from .._core._validate import check_count, check_tolerance
from ._adaptation import adapting_part
from ._task import Learned


def with_learned_rates(
    model: Params,
    rate: float,
    *,
    num_steps: int | None = None,
    per_parameter: bool = True,
    adapts: Callable[[Any], Any] | None = None,
) -> Learned:
    """A model with learning rates that are learned with it: the start of Meta-SGD (Li,
    Zhou, Chen and Li, 2017), or of the rates of MAML++ (Antoniou, Edwards and Storkey,
    2019). [`metaopt.few_shot.learned_rates`][] is the transform that uses them.

    **Arguments:**

    - `model`: the model before adaptation.
    - `rate`: what all rates are at first.
    - `num_steps`: the number of inner steps, where each is to have rates of its own.
    - `per_parameter`: whether each parameter has a rate, or each array one for all.
    - `adapts`: as in [`metaopt.few_shot.MAML`][].

    **Returns:**

    A [`metaopt.few_shot.Learned`][], whose `settings.rates` are a pytree like what adapts.
    """
    check_tolerance(rate, "rate", optional=False)
    steps = ()
    if num_steps is not None:
        check_count(num_steps, "num_steps")
        steps = (num_steps,)

    def rates(leaf):
        shape = (*steps, *(leaf.shape if per_parameter else ()))
        return jnp.full(shape, rate, leaf.dtype)

    adapting = adapting_part(model, adapts)[0]
    return Learned(model, _Rates(jax.tree.map(rates, adapting), num_steps is not None))


class _Rates(eqx.Module):
    rates: Any
    # Kept with them: read in the other way, rates of some shapes would broadcast.
    per_step: bool = eqx.field(static=True)


def learned_rates(learned: Learned) -> optax.GradientTransformation:
    """Gradient descent at the rates in `learned.settings`. If each step has rates of
    its own, steps beyond those that were learned, as at test time, take the last ones.

    !!! example

        ```python
        import metaopt as mo

        mo.Descent(mo.few_shot.learned_rates, num_steps=1)
        ```

    **Arguments:**

    - `learned`: as [`metaopt.few_shot.with_learned_rates`][] makes it.

    **Returns:**

    An optax transform.

    **Raises:**

    `ValueError` for something else.
    """
    settings = _settings(learned, _Rates, "with_learned_rates")

    def update(updates, state, params=None):
        _check_alike(updates, settings.rates)

        def scaled(gradient, rate):
            if settings.per_step:
                rate = rate[jnp.minimum(state, len(rate) - 1)]
            return -(rate * gradient).astype(gradient.dtype)

        return jax.tree.map(scaled, updates, settings.rates), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


def with_learned_curvature(
    model: Params,
    rate: float,
    *,
    max_size: int = 512,
    adapts: Callable[[Any], Any] | None = None,
) -> Learned:
    """A model with a preconditioner that is learned with it: the start of Meta-Curvature
    (Park and Oliva, 2019). [`metaopt.few_shot.learned_curvature`][] is the transform that
    uses it.

    **Arguments:**

    - `model`: the model before adaptation.
    - `rate`: the learning rate at first; the preconditioner begins as that multiple of
        the identity.
    - `max_size`: axes that are longer than this are left alone. (The kernel of a
        convolution has a matrix for each of its axes; the paper has one for all pixels.)
    - `adapts`: as in [`metaopt.few_shot.MAML`][].

    **Returns:**

    A [`metaopt.few_shot.Learned`][], whose `settings` are the rate and, for each axis of
    each array, a square matrix.
    """
    check_tolerance(rate, "rate", optional=False)
    check_count(max_size, "max_size")

    def curvature(leaf):
        return _Curvature(
            jnp.asarray(rate, leaf.dtype),
            tuple(
                jnp.eye(size, dtype=leaf.dtype) if 1 < size <= max_size else None
                for size in leaf.shape
            ),
        )

    adapting = adapting_part(model, adapts)[0]
    return Learned(model, _Curvatures(jax.tree.map(curvature, adapting)))


def learned_curvature(learned: Learned) -> optax.GradientTransformation:
    """Gradient descent with the preconditioner in `learned.settings`: the gradient of
    each array is multiplied by a learned matrix along each of its axes.

    !!! example

        ```python
        import metaopt as mo

        mo.Descent(mo.few_shot.learned_curvature, num_steps=1)
        ```

    **Arguments:**

    - `learned`: as [`metaopt.few_shot.with_learned_curvature`][] makes it.

    **Returns:**

    An optax transform.

    **Raises:**

    `ValueError` for something else.
    """
    settings = _settings(learned, _Curvatures, "with_learned_curvature")

    def transformed(gradient: Array, curvature: "_Curvature") -> Array:
        out = gradient
        for axis, matrix in enumerate(curvature.matrices):
            if matrix is not None:
                out = jnp.moveaxis(jnp.tensordot(matrix, out, (1, axis)), 0, axis)
        return -curvature.rate * out

    def update(updates, state, params=None):
        is_leaf = lambda x: isinstance(x, _Curvature)
        _check_alike(updates, jax.tree.map(lambda _: 0, settings.arrays, is_leaf=is_leaf))
        return jax.tree.map(transformed, updates, settings.arrays), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _Curvature(eqx.Module):
    rate: Array
    matrices: tuple[Array | None, ...]


class _Curvatures(eqx.Module):
    arrays: Any


def _check_alike(updates: Any, settings: Any) -> None:
    if jax.tree.structure(updates) != jax.tree.structure(settings):
        raise ValueError(
            "The settings that are learned are for other arrays than those that adapt. "
            "Give both the same `adapts`: `metaopt.few_shot.with_learned_rates(model, "
            "rate, adapts=...)` and `metaopt.few_shot.MAML(..., adapts=...)`."
        )


def _settings(learned: Any, kind: type, maker: str) -> Any:
    if not isinstance(learned, Learned) or not isinstance(learned.settings, kind):
        raise ValueError(
            "The settings of the inner solver are not learned, or are others. Start from "
            f"`metaopt.few_shot.{maker}(model, rate)` in place of the model."
        )
    return learned.settings
