"""Training a best-response network, and the outer gradient that it gives."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._best_response import bind, bind_at_centre, response_filter
from .._core._tree import leaf_names
from .._core._types import Aux, FloatScalar, ModelState, Params
from .._jaxpr._dependence import depends, without_derivative
from .._jaxpr._detach import stop_gradient
from .._problem import AbstractPredictionProblem, AbstractProblem, BilevelProblem
from ._perturbed import mean_state, Numbers, PerturbedBatch


class TrainingLoss(NamedTuple):
    """The loss that one training step of a best-response network differentiates.

    - `total`: what is differentiated in the params.
    - `loss`: the inner loss, for the report.
    - `state`: the new model state.
    """

    total: FloatScalar
    loss: FloatScalar
    state: ModelState


class OuterGradient(NamedTuple):
    """The results of one validation step.

    - `value`, `aux`: the outer loss and its auxiliary output.
    - `hyper`: its derivative in the numbers of `hyper`.
    - `log_scale`: that of its mean over perturbations in the logarithms of their scales.
    """

    value: FloatScalar
    aux: Aux
    hyper: Numbers
    log_scale: Numbers


class AbstractBestResponseMethod(eqx.Module):
    """A method of training a best-response network and of using it.

    Everything is a function of the numbers in `hyper` as one vector. The params hold
    best-response layers.
    """

    @abc.abstractmethod
    def check(self, problem: BilevelProblem) -> None:
        """Raise a `ValueError` for a problem that does not fit."""

    @abc.abstractmethod
    def train(
        self,
        problem: AbstractProblem,
        params: Params,
        batch: PerturbedBatch,
        state: ModelState,
    ) -> TrainingLoss:
        """The loss of one training step.

        **Arguments:**

        - `problem`: the inner problem.
        - `params`: with best-response layers.
        - `batch`: the batch, and how `hyper` is perturbed for its groups.
        - `state`: the model state.

        **Returns:**

        A `TrainingLoss`.
        """

    @abc.abstractmethod
    def differentiate(
        self,
        problem: BilevelProblem,
        params: Params,
        batch: PerturbedBatch,
        state: ModelState,
        learns_scale: bool,
    ) -> OuterGradient:
        """The outer loss through the learned response, and its derivative.

        **Arguments:**

        - `problem`: the bilevel problem.
        - `learns_scale`: whether the derivative in `log_scale` is wanted.
        - the others as for `train`.

        **Returns:**

        An `OuterGradient`.
        """


class STN(AbstractBestResponseMethod):
    r"""Self-tuning networks.

    General weights and response are trained together on the inner loss at perturbed
    `hyper`,

    $$\min_{W, \Theta} \; \mathbb{E}_\epsilon\, loss(W + \Theta \epsilon,
    \lambda + \epsilon).$$

    Works for any loss. It converges to the best response up to an error that grows with the
    square of the scale of the perturbation; [`metaopt.DeltaSTN`][] has less of that, costs
    a little more and needs the loss in two parts.

    In the paper the response is a function of $\lambda + \epsilon$, of which this is the
    same function written around the present $\lambda$ (general weights follow it). There,
    what trains the general weights trains the response as well, in proportion to
    $\lambda$: where that is far from zero, it is no response any more.

    ??? cite "Source"

        MacKay, Vicol, Lorraine, Duvenaud, Grosse: *Self-Tuning Networks: Bilevel
        Optimization of Hyperparameters using Structured Best-Response Functions*,
        ICLR 2019.
    """

    def check(self, problem):
        if not problem.inner.has_loss:
            raise ValueError(
                "A best-response network is trained on an inner loss, and "
                f"`{type(problem.inner).__name__}` has none: the inner problem must be a "
                "`metaopt.extend.AbstractInnerProblem`."
            )

    def train(self, problem, params, batch, state):
        coordinates, hyper = batch.coordinates, batch.hyper

        def one(rows, perturbation, key):
            perturbed = coordinates.hyper(hyper + perturbation)
            model = bind(params, coordinates.seen(perturbation))
            out = problem.evaluate(model, perturbed, rows, key, state)
            return out.value, out.state

        values, states = batch.groups.map(one, batch.perturbations, batch.keys)
        loss = jnp.mean(values)
        return TrainingLoss(loss, loss, mean_state(states))

    def differentiate(self, problem, params, batch, state, learns_scale):
        coordinates, hyper = batch.coordinates, batch.hyper

        def mean(centre, log_scale):
            def one(rows, noise, key):
                change = centre + jnp.exp(log_scale) * noise
                model = bind(params, coordinates.seen(change))
                at = coordinates.hyper(hyper + change)
                value, aux = problem.evaluate_outer(model, at, rows, key, state)
                return value, eqx.filter(aux, eqx.is_array)

            values, aux = batch.groups.map(one, batch.noise, batch.keys)
            return jnp.mean(values), aux

        (value, aux), gradients = jax.value_and_grad(mean, (0, 1), has_aux=True)(
            jnp.zeros_like(hyper), batch.log_scale
        )
        return OuterGradient(value, aux, *gradients)


class DeltaSTN(AbstractBestResponseMethod):
    r"""Self-tuning networks with a centred, linearised response.

    The network answers to the *change* of `hyper`. Its general weights are trained on the
    inner loss at `hyper` as it is, and its response $\Theta$ on that of the linearised
    network, whose derivative along $\Theta \epsilon$ is one `jax.jvp`,

    $$\min_\Theta \; \mathbb{E}_\epsilon\, loss\big(f(W) + J_f(W)\, \Theta \epsilon,\;
    \lambda + \epsilon\big),$$

    so that neither disturbs the other, and what is differentiated in the outer loss is the
    Jacobian of the best response itself. If the criterion is quadratic in the predictions
    of the network, and `hyper` acts in the criterion alone, the response found is that of
    the implicit function theorem with the curvature of Gauss and Newton, whatever the scale
    of $\epsilon$. Leaves that act in `predict`, such as a dropout rate, are sampled as they
    are, at the price of another forward pass, of noise, and of an error that grows with the
    square of the scale.

    Needs a loss in two parts, an [`metaopt.extend.AbstractPredictionProblem`][], whose
    criterion has a derivative in `hyper`. There are four differences from the paper: the
    criterion is linearised in `hyper` as well, which removes an error that grows with the
    square of the scale; a part of the loss whose mean over perturbations is zero is left
    out where all of `hyper` acts in the criterion; the hypergradient is taken at the
    centre, and not averaged over perturbations; and as `hyper` moves the general weights
    move along the learned response.

    ??? cite "Source"

        Bae, Grosse: *Delta-STN: Efficient Bilevel Optimization for Neural Networks using
        Structured Response Jacobians*, NeurIPS 2020.
    """

    def check(self, problem):
        if not isinstance(problem.inner, AbstractPredictionProblem):
            raise ValueError(
                "`DeltaSTN` linearises what the network predicts, and "
                f"`{type(problem.inner).__name__}` does not say what that is. Write the "
                "inner problem in two parts, as a "
                "`metaopt.extend.AbstractPredictionProblem` or "
                "`metaopt.PredictionProblem`, or use `method=metaopt.STN()`, which takes "
                "any loss."
            )

    def train(self, problem, params, batch, state):
        assert isinstance(problem, AbstractPredictionProblem)  # as `check` has seen
        is_response = response_filter(params)
        response, general = eqx.partition(params, is_response)
        held = eqx.combine(response, stop_gradient(general))
        coordinates, hyper = batch.coordinates, batch.hyper
        centre, zero = coordinates.hyper(hyper), jnp.zeros_like(hyper)
        samples = _samples(problem, params, batch, state)
        _check_criterion(problem, params, batch, state)

        def one(rows, perturbation, key):
            perturbed = coordinates.hyper(hyper + perturbation)

            def predict(params, change, hyper):
                model = bind_at_centre(params, coordinates.seen(change))
                out, new = problem.evaluate_predictions(model, hyper, rows, key, state)
                moving, rest = eqx.partition(out, eqx.is_inexact_array)
                return moving, (rest, new)

            # Once for the general weights and once for the response: where `hyper` does
            # not act here, XLA sees that the two are the same and keeps one.
            moving, (unperturbed_rest, new) = predict(params, zero, centre)
            base, tangent, (rest, _) = jax.jvp(
                lambda change: predict(held, change, perturbed if samples else centre),
                (zero,),
                (perturbation,),
                has_aux=True,
            )
            base, rest = stop_gradient((base, rest))
            seen = coordinates.seen(perturbation)

            def criterion(out, change, at):
                out, params = eqx.combine(out, rest), bind(held, change)
                hyper = coordinates.hyper(at)
                return problem.evaluate_criterion(out, params, hyper, rows, key)[0]

            changed = jax.tree.map(jnp.add, base, tangent)
            value, change = jax.jvp(
                lambda at: criterion(changed, seen, at), (hyper,), (perturbation,)
            )
            response = value + change
            if not samples:
                # Of mean zero over perturbations, and for most of the noise.
                _, linear = jax.jvp(
                    lambda out, change: criterion(out, change, hyper),
                    (base, zero),
                    (tangent, seen),
                )
                response -= linear
            out = eqx.combine(moving, unperturbed_rest)
            loss, _ = problem.evaluate_criterion(out, params, centre, rows, key)
            return loss, response, new

        losses, responses, states = batch.groups.map(one, batch.perturbations, batch.keys)
        loss = jnp.mean(losses)
        return TrainingLoss(loss + jnp.mean(responses), loss, mean_state(states))

    def differentiate(self, problem, params, batch, state, learns_scale):
        coordinates, hyper = batch.coordinates, batch.hyper

        def at_centre(change):
            model = bind_at_centre(params, coordinates.seen(change))
            at = coordinates.hyper(hyper + change)
            rows = batch.groups.whole()
            return problem.evaluate_outer(model, at, rows, batch.keys[0], state)

        def mean(log_scale):
            def one(rows, noise, key):
                change = jnp.exp(log_scale) * noise
                at = coordinates.hyper(hyper + change)
                model = bind(params, coordinates.seen(change))
                return problem.evaluate_outer(model, at, rows, key, state)[0]

            return jnp.mean(batch.groups.map(one, batch.noise, batch.keys))

        zero = jnp.zeros_like(hyper)
        (value, aux), gradient = jax.value_and_grad(at_centre, has_aux=True)(zero)
        of_scale = jax.grad(mean)(batch.log_scale) if learns_scale else zero
        return OuterGradient(value, eqx.filter(aux, eqx.is_array), gradient, of_scale)


def _check_criterion(problem, params, batch, state) -> None:
    """Check that everything in the criterion acts through its derivative."""
    coordinates, hyper = batch.coordinates, batch.hyper

    def criterion(trainable):
        def one(rows, key):
            at = coordinates.hyper(hyper)
            out, _ = problem.evaluate_predictions(params, at, rows, key, state)
            at = eqx.combine(trainable, coordinates.rest)
            return problem.evaluate_criterion(out, params, at, rows, key)[0]

        return batch.groups.map(one, batch.keys)

    at = coordinates.trainable(hyper)
    names, marks = leaf_names(at, "hyper"), without_derivative(criterion, at)
    unseen = [f"`{name}`" for name, mark in zip(names, marks, strict=True) if mark]
    if unseen:
        raise ValueError(
            "`DeltaSTN` takes the derivative of the criterion in `hyper`, which is "
            f"zero by construction for {', '.join(unseen)} (rounding, comparisons, "
            "random draws). Let it act in `predict`, which is sampled, or use "
            "`method=metaopt.STN()`."
        )


def _samples(problem, params, batch, state) -> bool:
    """Whether `hyper` acts on the predictions, so that its effect is sampled."""

    def predict(hyper):
        def one(rows, key):
            at = batch.coordinates.hyper(hyper)
            out, _ = problem.evaluate_predictions(params, at, rows, key, state)
            return eqx.filter(out, eqx.is_array)

        return batch.groups.map(one, batch.keys)

    return depends(predict, batch.hyper, despite_stop_gradient=True)
