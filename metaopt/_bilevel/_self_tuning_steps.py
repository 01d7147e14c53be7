"""The two kinds of steps that a self-tuning run alternates, and its state."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._best_response import moved, response_filter
from .._core._tree import split_trainable, tree_scaled_norm
from .._core._types import (
    Batch,
    BoolScalar,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    PyTree,
)
from .._problem import BilevelProblem
from .._promises import all_finite, keep_where, overflowed
from ._best_response_method import AbstractBestResponseMethod
from ._drawn import Cursors
from ._optimizer_step import optimizer_step
from ._perturbed import Coordinates, cut, perturb, PerturbedBatch


class SelfTuningState(eqx.Module):
    """The state that one outer step of a self-tuning run hands to the next.

    **Attributes:**

    - `hyper`: the outer variables.
    - `params`: the params, with best-response layers in them.
    - `model_state`: the model state, or `None`.
    - `log_scale`: the logarithm of the scale of the perturbation of each number in
        `hyper`, of shape `(num_hyper,)`.
    - `general_state`, `response_state`, `hyper_state`, `scale_state`: the states of the
        optimizers.
    - `cursors`: the cursors of `train` and `valid`: the batches that come next.
    - `key`, `num_steps`: the randomness of the run, and the outer steps taken.
    - `drawn`: whether the problem's `init` drew the initial params.
    """

    hyper: Hyper
    params: Params
    model_state: ModelState
    log_scale: Float[Array, " num_hyper"]
    general_state: PyTree
    response_state: PyTree
    hyper_state: PyTree
    scale_state: PyTree
    cursors: Cursors
    key: Key
    num_steps: IntScalar
    drawn: bool = eqx.field(static=True)


class SelfTuningSteps(eqx.Module):
    """The steps of weights, response, `hyper` and scales.

    The arguments are those of [`metaopt.SelfTuningSolver`][].
    """

    params: optax.GradientTransformation
    response: optax.GradientTransformation
    hyper: optax.GradientTransformation
    scale: optax.GradientTransformation | None
    method: AbstractBestResponseMethod
    entropy_weight: float
    scale_bounds: tuple[float, float]
    examples_per_perturbation: int | None = eqx.field(static=True)

    def init(
        self,
        hyper: Hyper,
        params: Params,
        model_state: ModelState,
        log_scale: Float[Array, " num_hyper"],
        cursors: Cursors,
        key: Key,
        drawn: bool,
    ) -> SelfTuningState:
        """The state before the first step, with best-response layers in `params`."""
        trainable = split_trainable(params)[0]
        response, general = eqx.partition(trainable, response_filter(trainable))
        return SelfTuningState(
            hyper=hyper,
            params=params,
            model_state=model_state,
            log_scale=log_scale,
            general_state=self.params.init(general),
            response_state=self.response.init(response),
            hyper_state=self.hyper.init(split_trainable(hyper)[0]),
            scale_state=None if self.scale is None else self.scale.init(log_scale),
            cursors=cursors,
            key=key,
            num_steps=jnp.zeros((), int),
            drawn=drawn,
        )

    def train(
        self,
        problem: BilevelProblem,
        state: SelfTuningState,
        batch: Batch,
        key: Key,
        answered: list[bool],
    ) -> tuple[SelfTuningState, "Trained"]:
        """One step of the network at perturbed `hyper`; not taken if it is not finite.

        `answered` says of each floating-point leaf of `hyper` whether the inner solution
        depends on it.
        """
        perturbed = self._perturbed("train", state, batch, key, answered)
        trainable, static = split_trainable(state.params)

        def loss(trainable):
            out = self.method.train(
                problem.inner,  # pyright: ignore[reportArgumentType] (checked in `init`)
                eqx.combine(trainable, static),
                perturbed,
                state.model_state,
            )
            return out.total, (out.loss, out.state)

        gradient, (value, model_state) = jax.grad(loss, has_aux=True)(trainable)
        # One gradient of two families: each has an optimizer of its own.
        is_response = response_filter(trainable)
        response_gradient, general_gradient = eqx.partition(gradient, is_response)
        response, general = eqx.partition(trainable, is_response)
        general, general_state = optimizer_step(
            self.params, general_gradient, state.general_state, general, value
        )
        response, response_state = optimizer_step(
            self.response, response_gradient, state.response_state, response, value
        )
        norm = tree_scaled_norm(gradient)
        params = eqx.combine(general, response, static)
        good = all_finite(norm, value, params)
        keep = keep_where(good)
        new = dataclasses.replace(
            state,
            params=keep(params, state.params),
            model_state=keep(model_state, state.model_state),
            general_state=keep(general_state, state.general_state),
            response_state=keep(response_state, state.response_state),
        )
        return new, Trained(value, norm, good)

    def validate(
        self,
        problem: BilevelProblem,
        state: SelfTuningState,
        batch: Batch,
        key: Key,
        moves: BoolScalar,
        answered: list[bool],
    ) -> tuple[SelfTuningState, "Validated"]:
        """One step of `hyper`, taken where it `moves` and is finite."""
        perturbed = self._perturbed("valid", state, batch, key, answered)
        coordinates, hyper = perturbed.coordinates, perturbed.hyper
        out = self.method.differentiate(
            problem, state.params, perturbed, state.model_state, self.scale is not None
        )
        gradient = coordinates.trainable(out.hyper)
        trainable, rest = split_trainable(state.hyper)
        new_trainable, hyper_state = optimizer_step(
            self.hyper, gradient, state.hyper_state, trainable, out.value
        )
        new_hyper = eqx.combine(new_trainable, rest)
        change = coordinates.seen(coordinates.vector(new_hyper) - hyper)
        params = moved(state.params, change)
        norm = tree_scaled_norm(out.hyper)
        # A step that is too long can overflow on the way of the params, too.
        good = all_finite(norm, out.value, new_hyper, params)
        good &= ~overflowed(hyper_state, state.hyper_state)
        keep = keep_where(moves & good)
        log_scale, scale_state = state.log_scale, state.scale_state
        if self.scale is not None:
            # The entropy of the perturbation is the sum of these, but for a constant.
            of_scale = out.log_scale - self.entropy_weight
            of_scale = jnp.where(jnp.isfinite(of_scale), coordinates.seen(of_scale), 0)
            new_log_scale, scale_state = optimizer_step(
                self.scale, of_scale, scale_state, log_scale, out.value
            )
            low, high = (jnp.log(bound) for bound in self.scale_bounds)
            log_scale = jnp.clip(new_log_scale, low, high)
        new = dataclasses.replace(
            state,
            hyper=keep(new_hyper, state.hyper),
            params=keep(params, state.params),
            log_scale=keep(log_scale, state.log_scale),
            hyper_state=keep(hyper_state, state.hyper_state),
            scale_state=keep(scale_state, state.scale_state),
        )
        zeros = sum(jnp.sum(leaf == 0) for leaf in jax.tree.leaves(gradient))
        return new, Validated(out.value, out.aux, norm, jnp.asarray(zeros), good)

    def _perturbed(
        self,
        name: str,
        state: SelfTuningState,
        batch: Batch,
        key: Key,
        answered: list[bool],
    ) -> PerturbedBatch:
        groups = cut(batch, self.examples_per_perturbation, name)
        coordinates = Coordinates(state.hyper, answered)
        return perturb(groups, coordinates, state.hyper, state.log_scale, key)


class Trained(eqx.Module):
    """The report of a training step."""

    loss: FloatScalar
    norm: FloatScalar
    good: BoolScalar


class Validated(eqx.Module):
    """The report of a validation step."""

    value: FloatScalar
    aux: Any
    norm: FloatScalar
    num_zeros: IntScalar
    good: BoolScalar
