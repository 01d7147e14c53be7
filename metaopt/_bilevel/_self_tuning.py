"""The self-tuning solver: one run trains a best-response network and tunes `hyper`."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .._best_response import best_responses, response_filter, self_tuning
from .._data import AbstractData, BatchSequence
from .._problem import BilevelProblem, initialise
from .._report import Report
from .._results import first_failure, mask_result, RESULTS
from .._solver import Outcome
from .._tree import (
    split_trainable,
    tree_all_finite,
    tree_scaled_norm,
    tree_strong,
    tree_where_arrays,
)
from .._types import (
    BoolScalar,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    PyTree,
    Vector,
)
from .._validate import check_count, check_kind, check_params, check_tolerance
from ._base import AbstractBilevelSolver, BilevelStep
from ._best_response import AbstractBestResponseMethod, STN
from ._perturbed import Coordinates, cut
from ._self_tuning_checks import check_losses, unreached_leaves


class SelfTuningState(eqx.Module):
    """What one outer step of a self-tuning run hands to the next.

    **Attributes:**

    - `hyper`: the outer variables.
    - `params`: the params, with best-response layers in them.
    - `model_state`: the model state, or `None`.
    - `log_scale`: the logarithm of the scale of the perturbation of each number in
        `hyper`, of shape `(num_hyper,)`.
    - `general_state`, `response_state`, `hyper_state`, `scale_state`: the states of the
        optimizers.
    - `key`, `num_steps`: the randomness of the run, and the outer steps taken.
    - `method`: how the network is trained.
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
    key: Key
    num_steps: IntScalar
    method: AbstractBestResponseMethod
    drawn: bool = eqx.field(static=True)


class SelfTuningSolver(AbstractBilevelSolver):
    """Trains a network that *is* the best response, and `hyper` through it, in one run.

    The layers of the model become best-response layers
    ([`metaopt.nn.self_tuning`][]), whose weights are a function of `hyper`. Training
    steps fit that function around the present `hyper`: each example sees a random
    perturbation of it, in the loss and in the weights alike. Validation steps then
    differentiate the outer loss through the function. No inner problem is solved and no
    linear system either, so a run costs little more than training once; it returns a
    *schedule* of `hyper` with a model trained on it. What enters neither loss nor model,
    such as a learning rate, cannot be tuned this way.

    One outer step is `num_rounds` rounds of `train_steps` training and `valid_steps`
    validation steps. The `outer_loss` in reports is that of the last validation batch,
    under [`metaopt.STN`][] at perturbed `hyper`.

    Both losses have to be means over the rows of a batch (plus what does not depend on
    the batch), and to use the layers of the model by calling them; penalties on weights
    are written with [`metaopt.nn.squared_norm`][]. Both is checked before the run.

    **Arguments:**

    - `params`: the optax transform for the weights.
    - `hyper`: the optax transform for `hyper`.
    - `scale`: the optax transform for the scales of the perturbation; `None` leaves
        them as they are.
    - `response`: the optax transform for the response; by default like `params`.
    - `method`: [`metaopt.STN`][] or [`metaopt.DeltaSTN`][].
    - `initial_scale`: the standard deviation of the perturbation, in the units of the
        numbers in `hyper`: one for all, or a pytree like `hyper`.
    - `entropy_weight`: what the outer loss pays for an entropy of the perturbation that
        is higher by one. Keeps a learned scale from falling to zero.
    - `scale_bounds`: the smallest and the largest scale.
    - `train_steps`, `valid_steps`: how many steps of each kind make a round.
    - `num_rounds`: the rounds in one outer step, which are compiled into one.
    - `warmup`: the first outer steps, in which `hyper` and scales are left alone.
    - `examples_per_perturbation`: how many rows of a batch share a perturbation, a
        divisor of the batch size. `None` is one perturbation for each batch; where rows
        are coupled, as by batch normalisation, give `None` or a large number.

    **Raises:**

    `ValueError` where one of these is of the wrong kind or out of range.

    **Example:**

    ```python
    import metaopt as mo
    import optax

    solver = mo.SelfTuningSolver(
        params=optax.adam(1e-3), hyper=optax.adam(1e-2), scale=optax.adam(1e-2)
    )
    ```
    """

    params: optax.GradientTransformation
    hyper_optimizer: optax.GradientTransformation
    scale: optax.GradientTransformation | None
    response: optax.GradientTransformation
    method: AbstractBestResponseMethod
    initial_scale: Any
    entropy_weight: float
    scale_bounds: tuple[float, float]
    train_steps: int = eqx.field(static=True)
    valid_steps: int = eqx.field(static=True)
    num_rounds: int = eqx.field(static=True)
    warmup: int = eqx.field(static=True)
    examples_per_perturbation: int | None = eqx.field(static=True)

    def __init__(
        self,
        params: optax.GradientTransformation,
        hyper: optax.GradientTransformation,
        scale: optax.GradientTransformation | None = None,
        *,
        response: optax.GradientTransformation | None = None,
        method: AbstractBestResponseMethod = STN(),
        initial_scale: Any = 0.3,
        entropy_weight: float = 1e-3,
        scale_bounds: tuple[float, float] = (1e-3, 3.0),
        train_steps: int = 5,
        valid_steps: int = 1,
        num_rounds: int = 1,
        warmup: int = 0,
        examples_per_perturbation: int | None = 1,
    ):
        transform = optax.GradientTransformation
        check_kind(params, transform, "params", "optax.adam(1e-3)")
        check_kind(hyper, transform, "hyper", "optax.adam(1e-2)")
        if scale is not None:
            check_kind(scale, transform, "scale", "optax.adam(1e-2)")
        if response is not None:
            check_kind(response, transform, "response", "optax.adam(1e-3)")
        check_kind(method, AbstractBestResponseMethod, "method", "metaopt.DeltaSTN()")
        check_tolerance(entropy_weight, "entropy_weight", optional=False)
        for name, count, minimum in (
            ("train_steps", train_steps, 1),
            ("valid_steps", valid_steps, 1),
            ("num_rounds", num_rounds, 1),
            ("warmup", warmup, 0),
        ):
            check_count(count, name, minimum)
        if examples_per_perturbation is not None:
            check_count(examples_per_perturbation, "examples_per_perturbation")
        _check_scales(initial_scale, scale_bounds)
        self.params = params
        self.hyper_optimizer = hyper
        self.scale = scale
        self.response = params if response is None else response
        self.method = method
        self.initial_scale = initial_scale
        # Python numbers, whose weak type leaves `hyper` in its dtype.
        self.entropy_weight = float(entropy_weight)
        self.scale_bounds = float(scale_bounds[0]), float(scale_bounds[1])
        self.train_steps = train_steps
        self.valid_steps = valid_steps
        self.num_rounds = num_rounds
        self.warmup = warmup
        self.examples_per_perturbation = examples_per_perturbation

    @property
    def warm_starts(self):
        return True

    @property
    def exact(self):
        return self

    def init(self, problem, hyper, train, valid, *, params, model_state, key):
        self.method.check(problem)
        self._check_data(train, valid)
        init_key, convert_key, check_key, key = jax.random.split(key, 4)
        drawn = params is None
        if drawn:
            params, model_state = initialise(problem.inner, hyper, init_key)
        check_params(params)
        numbers = Coordinates.vector(hyper)
        if not best_responses(params):
            params = self_tuning(params, numbers.size, key=convert_key)
        for layer in best_responses(params):
            if layer.num_hyper != numbers.size:
                raise ValueError(
                    f"A best-response layer of the params responds to {layer.num_hyper} "
                    f"outer variables, and `hyper` holds {numbers.size} floating-point "
                    "numbers. Convert the model with `metaopt.nn.self_tuning(model, "
                    f"num_hyper={numbers.size}, key=key)`, or hand it over as it is."
                )
        params, model_state = tree_strong(params), tree_strong(model_state)
        size = self.examples_per_perturbation
        check_losses(
            problem,
            params,
            hyper,
            cut(_one_batch(train, check_key), size, "train"),
            cut(_one_batch(valid, check_key), size, "valid"),
            check_key,
            model_state,
        )
        general, response, _ = _split(params)
        trainable = split_trainable(hyper)[0]
        log_scale = _log_scale(self.initial_scale, trainable, numbers)
        return SelfTuningState(
            hyper=hyper,
            params=params,
            model_state=model_state,
            log_scale=log_scale,
            general_state=self.params.init(general),
            response_state=self.response.init(response),
            hyper_state=self.hyper_optimizer.init(trainable),
            scale_state=None if self.scale is None else self.scale.init(log_scale),
            key=key,
            num_steps=jnp.zeros((), int),
            method=self.method,
            drawn=drawn,
        )

    def step(self, problem, state, train, valid):
        if type(state.method) is not type(self.method):
            raise ValueError(
                f"`state` comes from a run with `{type(state.method).__name__}()` and goes "
                f"on with `{type(self.method).__name__}()` here. Use the same `method`."
            )
        self._check_data(train, valid)  # of an iterator, the first alone is known to `init`
        unreached, left_out, answered = unreached_leaves(
            problem,
            state.params,
            state.hyper,
            _one_batch(train, state.key),
            _one_batch(valid, state.key),
            state.key,
            state.model_state,
            state.drawn,
        )
        key = jax.random.fold_in(state.key, state.num_steps)
        train_key, valid_key, key = jax.random.split(key, 3)
        train_draws = _planned(train, train_key, self.num_rounds, self.train_steps)
        valid_draws = _planned(valid, valid_key, self.num_rounds, self.valid_steps)
        moves = state.num_steps >= self.warmup
        arrays, static = eqx.partition(state, eqx.is_array)

        def go_round(arrays, inputs):
            train_draws, valid_draws, key = inputs
            train_key, valid_key = jax.random.split(key)

            def train_step(arrays, inputs):
                draw, key = inputs
                new, seen = self._train_step(
                    problem, eqx.combine(arrays, static), train.batch(draw), key, answered
                )
                return eqx.filter(new, eqx.is_array), seen

            def valid_step(arrays, inputs):
                draw, key = inputs
                full, batch = eqx.combine(arrays, static), valid.batch(draw)
                new, seen = self._valid_step(problem, full, batch, key, moves, answered)
                return eqx.filter(new, eqx.is_array), seen

            keys = jax.random.split(train_key, self.train_steps)
            arrays, trained = jax.lax.scan(train_step, arrays, (train_draws, keys))
            keys = jax.random.split(valid_key, self.valid_steps)
            arrays, validated = jax.lax.scan(valid_step, arrays, (valid_draws, keys))
            return arrays, (trained, validated)

        keys = jax.random.split(key, self.num_rounds)
        arrays, (trained, validated) = jax.lax.scan(
            go_round, arrays, (train_draws, valid_draws, keys)
        )
        new = eqx.combine(arrays, static)
        new = eqx.tree_at(lambda s: s.num_steps, new, state.num_steps + 1)
        report, good = self._report(trained, validated, unreached, left_out)
        return new, BilevelStep(report, good)

    def params_at(self, state: SelfTuningState) -> Params:
        """The ordinary params that the network gives at the present `hyper`.

        **Arguments:**

        - `state`: the state of a run, as a `callback` of [`metaopt.solve_bilevel`][]
            receives it.

        **Returns:**

        A pytree like the params of the inner problem, without best-response layers.
        """
        zero = jnp.zeros_like(Coordinates.vector(state.hyper))
        return self.method.response(state.params, zero)

    def evaluate(self, problem, state, train, valid):
        params = self.params_at(state)
        key = jax.random.fold_in(state.key, state.num_steps)
        value, _ = problem.evaluate_outer(
            params, state.hyper, _one_batch(valid, key), key, state.model_state
        )
        success: Any = RESULTS.successful
        outcome = Outcome(
            params=params,
            model_state=state.model_state,
            aux=None,
            result=success,
            num_steps=state.num_steps * (self.num_rounds * self.train_steps),
            losses=None,
            failed_step=jnp.asarray(-1),
        )
        return value, outcome

    def hyper(self, state):
        return state.hyper

    def _train_step(
        self,
        problem: BilevelProblem,
        state: SelfTuningState,
        batch: Any,
        key: Key,
        answered: list[bool],
    ) -> tuple[SelfTuningState, "_Trained"]:
        noise_key, loss_key = jax.random.split(key)
        groups = cut(batch, self.examples_per_perturbation, "train")
        coordinates = Coordinates(state.hyper, answered)
        hyper = coordinates.vector(state.hyper)
        noise = jax.random.normal(noise_key, (groups.num_groups, hyper.size), hyper.dtype)
        noise = coordinates.seen(noise)
        keys = jax.random.split(loss_key, groups.num_groups)
        trainable, static = split_trainable(state.params)

        def loss(trainable):
            out = self.method.train(
                problem.inner,  # pyright: ignore[reportArgumentType] (checked in `init`)
                eqx.combine(trainable, static),
                coordinates,
                hyper,
                jnp.exp(state.log_scale) * noise,
                groups,
                keys,
                state.model_state,
            )
            return out.total, (out.loss, out.state)

        gradient, (value, model_state) = jax.grad(loss, has_aux=True)(trainable)
        # One gradient of two families: each has an optimizer of its own.
        marks = response_filter(trainable)
        general, response = _updated(
            marks,
            gradient,
            trainable,
            value,
            (self.params, state.general_state),
            (self.response, state.response_state),
        )
        norm = tree_scaled_norm(gradient)
        params = eqx.combine(general.params, response.params, static)
        good = jnp.isfinite(norm) & jnp.isfinite(value) & tree_all_finite(params)
        keep = lambda new, old: tree_where_arrays(good, new, old)
        new = dataclasses.replace(
            state,
            params=keep(params, state.params),
            model_state=keep(model_state, state.model_state),
            general_state=keep(general.state, state.general_state),
            response_state=keep(response.state, state.response_state),
        )
        return new, _Trained(value, norm, good)

    def _valid_step(
        self,
        problem: BilevelProblem,
        state: SelfTuningState,
        batch: Any,
        key: Key,
        moves: BoolScalar,
        answered: list[bool],
    ) -> tuple[SelfTuningState, "_Validated"]:
        noise_key, loss_key = jax.random.split(key)
        groups = cut(batch, self.examples_per_perturbation, "valid")
        coordinates = Coordinates(state.hyper, answered)
        hyper = coordinates.vector(state.hyper)
        noise = jax.random.normal(noise_key, (groups.num_groups, hyper.size), hyper.dtype)
        noise = coordinates.seen(noise)
        keys = jax.random.split(loss_key, groups.num_groups)
        out = self.method.differentiate(
            problem,
            state.params,
            coordinates,
            hyper,
            state.log_scale,
            noise,
            groups,
            keys,
            state.model_state,
            self.scale is not None,
        )
        gradient = coordinates.trainable(out.hyper)
        trainable, rest = split_trainable(state.hyper)
        optimizer = optax.with_extra_args_support(self.hyper_optimizer)
        updates, hyper_state = optimizer.update(
            gradient, state.hyper_state, trainable, value=out.value
        )
        new_hyper = eqx.combine(optax.apply_updates(trainable, updates), rest)
        change = coordinates.seen(coordinates.vector(new_hyper) - hyper)
        params = self.method.follow(state.params, change)
        norm = tree_scaled_norm(out.hyper)
        good = jnp.isfinite(norm) & jnp.isfinite(out.value)
        # A step that is too long can overflow on the way of the params, too.
        good &= tree_all_finite((new_hyper, params))
        moves = moves & good
        keep = lambda new, old: tree_where_arrays(moves, new, old)
        log_scale, scale_state = state.log_scale, state.scale_state
        if self.scale is not None:
            # The entropy of the perturbation is the sum of these, but for a constant.
            of_scale = out.log_scale - self.entropy_weight
            of_scale = jnp.where(jnp.isfinite(of_scale), coordinates.seen(of_scale), 0)
            updates, scale_state = self.scale.update(of_scale, scale_state, log_scale)
            moved: Any = optax.apply_updates(log_scale, updates)
            low, high = (jnp.log(bound) for bound in self.scale_bounds)
            log_scale = jnp.clip(moved, low, high)
        new = dataclasses.replace(
            state,
            hyper=keep(new_hyper, state.hyper),
            params=keep(params, state.params),
            log_scale=keep(log_scale, state.log_scale),
            hyper_state=keep(hyper_state, state.hyper_state),
            scale_state=keep(scale_state, state.scale_state),
        )
        zeros = sum(jnp.sum(leaf == 0) for leaf in jax.tree.leaves(gradient))
        return new, _Validated(out.value, out.aux, norm, jnp.asarray(zeros), good)

    def _report(
        self,
        trained: "_Trained",
        validated: "_Validated",
        unreached: tuple[str, ...],
        left_out: tuple[str, ...],
    ) -> tuple[Report, BoolScalar]:
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
        trained, validated = jax.tree.map(flat, (trained, validated))
        last = jax.tree.map(
            lambda leaf: leaf[-1] if eqx.is_array(leaf) else leaf, validated
        )
        lost = jnp.logical_not(trained.good)
        failed_step = jnp.where(jnp.any(lost), jnp.argmax(lost), -1)
        bad_value = jnp.logical_not(jnp.all(jnp.isfinite(validated.value)))
        bad_gradient = jnp.logical_not(jnp.all(validated.good))
        result = first_failure(
            mask_result(jnp.any(lost), RESULTS.inner_nonfinite),
            mask_result(bad_value, RESULTS.outer_nonfinite),
            mask_result(bad_gradient, RESULTS.hypergradient_nonfinite),
        )
        report = Report(
            result=result,
            outer_loss=last.value,
            aux=last.aux,
            hypergradient_norm=last.norm,
            num_zeros=last.num_zeros,
            inner_loss=trained.loss[-1],
            inner_residual=trained.norm[-1],
            inner_error=None,
            num_inner_steps=jnp.asarray(self.num_rounds * self.train_steps),
            failed_step=failed_step,
            linear_residual=None,
            num_linear_steps=None,
            num_products=None,
            min_curvature=None,
            tolerance=None,
            returned_to_start=None,
            stored_bits=None,
            error=None,
            error_is_bound=False,
            adjoint=f"learned response ({type(self.method).__name__})",
            left_out=left_out,
            unreached=unreached,
        )
        return report, jnp.all(validated.good)

    def _check_data(self, train: AbstractData, valid: AbstractData) -> None:
        train.check(self.num_rounds * self.train_steps)
        valid.check(self.num_rounds * self.valid_steps)
        for data, name in ((train, "train"), (valid, "valid")):
            if not isinstance(data, BatchSequence):
                cut(_one_batch(data), self.examples_per_perturbation, name)


class _Trained(eqx.Module):
    loss: FloatScalar
    norm: FloatScalar
    good: BoolScalar


class _Validated(eqx.Module):
    value: FloatScalar
    aux: Any
    norm: FloatScalar
    num_zeros: IntScalar
    good: BoolScalar


class _Updated(eqx.Module):
    params: Vector
    state: PyTree


def _updated(marks: PyTree, gradient: Vector, params: Vector, value, general, response):
    """The params of two families, each after one step of its own optimizer."""
    out = []
    for (transform, state), keep in ((response, True), (general, False)):
        mine = jax.tree.map(lambda mark: mark == keep, marks)
        own, own_gradient = eqx.filter(params, mine), eqx.filter(gradient, mine)
        optimizer = optax.with_extra_args_support(transform)
        updates, state = optimizer.update(own_gradient, state, own, value=value)
        out.append(_Updated(optax.apply_updates(own, updates), state))
    response, general = out
    return general, response


def _split(params: Params) -> tuple[Vector, Vector, PyTree]:
    """The general arrays, those of the response, and all else."""
    trainable, static = split_trainable(params)
    marks = response_filter(trainable)
    response, general = eqx.partition(trainable, marks)
    return general, response, static


def _planned(data: AbstractData, key: Key, num_rounds: int, num_steps: int) -> PyTree:
    plan = data.plan(key, num_rounds * num_steps)
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_rounds, num_steps, *leaf.shape[1:]), plan
    )


def _one_batch(data: AbstractData, key: Key | None = None) -> Any:
    key = jax.random.key(0) if key is None else key
    return data.batch(jax.tree.map(lambda leaf: leaf[0], data.plan(key, 1)))


def _check_scales(initial_scale: Any, bounds: Any) -> None:
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    for bound in bounds if pair else ():
        check_tolerance(bound, "scale_bounds", optional=False)
    if not pair or not 0 < bounds[0] < bounds[1]:
        raise ValueError(
            "`scale_bounds` must be a pair of positive numbers, the smaller first; got "
            f"{bounds!r}."
        )
    for scale in jax.tree.leaves(initial_scale):
        number = np.asarray(scale)
        if isinstance(scale, bool) or not np.issubdtype(number.dtype, np.number):
            raise ValueError(f"`initial_scale` must be a number; got {scale!r}.")
        if not np.all((bounds[0] <= number) & (number <= bounds[1])):
            raise ValueError(
                f"`initial_scale` must lie within `scale_bounds`, {bounds}; got {scale!r}."
            )


def _log_scale(initial: Any, trainable: Vector, numbers: Array) -> Array:
    if jax.tree.structure(initial) == jax.tree.structure(0.0) and np.ndim(initial) == 0:
        return jnp.full_like(numbers, np.log(initial))
    as_array = lambda a: jnp.asarray(a, float if isinstance(a, int) else None)
    initial = split_trainable(jax.tree.map(as_array, initial))[0]
    if jax.tree.structure(initial) != jax.tree.structure(trainable):
        raise ValueError(
            "`initial_scale` must be a number or a pytree like `hyper`, of structure "
            f"{jax.tree.structure(trainable)}; got {jax.tree.structure(initial)}."
        )
    filled = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), initial, trainable)
    return jnp.log(Coordinates.vector(filled)).astype(numbers.dtype)
