"""The self-tuning solver: one run trains a best-response network and tunes `hyper`."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._best_response import best_responses, ordinary, self_tuning
from .._core._results import mask_result, RESULTS
from .._core._tree import split_trainable, tree_strong
from .._core._types import BoolScalar, Params, PyTree
from .._core._validate import check_count, check_kind, check_params, check_tolerance
from .._data import AbstractData
from .._problem import initialise
from .._promises import BothLosses, judged
from .._report import (
    AbstractDerivativeInfo,
    inner_steps,
    InnerInfo,
    OuterInfo,
    Report,
    Work,
)
from ._base import AbstractBilevelSolver, BilevelEvaluation, BilevelStep
from ._best_response_method import AbstractBestResponseMethod, STN
from ._drawn import check_drawn, Cursors, draw, draw_one, DrawnBatches, first_cursors
from ._perturbed import Coordinates, cut
from ._scale import check_scales, initial_log_scale
from ._self_tuning_checks import check_losses
from ._self_tuning_reach import unreached_leaves
from ._self_tuning_steps import SelfTuningState, SelfTuningSteps, Trained, Validated


class SelfTuningSolver(AbstractBilevelSolver):
    """Trains a network that *is* the best response, and `hyper` through it, in one run.

    The layers of the model become best-response layers ([`metaopt.nn.self_tuning`][]),
    whose weights are a function of `hyper`. Training steps fit that function around the
    present `hyper`: each example sees a random perturbation of it, in the loss and in the
    weights alike. Validation steps then differentiate the outer loss through the function.
    No inner problem is solved and no linear system either, so a run costs little more than
    training once; it returns a *schedule* of `hyper` with a model trained on it. A leaf
    that enters neither loss nor model, such as a learning rate, cannot be tuned this way.

    One outer step is `num_rounds` rounds of `train_steps` training and `valid_steps`
    validation steps. The `outer_loss` in reports is that of the last validation batch,
    under [`metaopt.STN`][] at perturbed `hyper`.

    Both losses have to be means over the rows of a batch (plus what does not depend on
    the batch), and to use the layers of the model by calling them; penalties on weights
    are written with [`metaopt.nn.squared_norm`][]. Both are checked before the run, unless
    it is inside of a `jax.jit` of your own.

    Every leaf that acts on the training loss is perturbed and tuned, with or without a
    derivative, even behind a `jax.lax.stop_gradient`, such as the rate of an
    `equinox.nn.Dropout`. Keep a number that is to stay constant out of `hyper`.

    In reports `inner_loss` and `inner_residual` are those of the last training step, before
    it was taken; the residual is the norm of the gradient in all params, those of the
    response included. Under [`metaopt.STN`][], `aux` has a leading axis of groups.

    **Arguments:**

    - `params`: the optax transform for the general params.
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

    steps: SelfTuningSteps
    initial_scale: Any
    train_steps: int = eqx.field(static=True)
    valid_steps: int = eqx.field(static=True)
    num_rounds: int = eqx.field(static=True)
    warmup: int = eqx.field(static=True)

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
        check_scales(initial_scale, scale_bounds)
        self.steps = SelfTuningSteps(
            params=params,
            response=params if response is None else response,
            hyper=hyper,
            scale=scale,
            method=method,
            # Python numbers, whose weak type leaves `hyper` in its dtype.
            entropy_weight=float(entropy_weight),
            scale_bounds=(float(scale_bounds[0]), float(scale_bounds[1])),
            examples_per_perturbation=examples_per_perturbation,
        )
        self.initial_scale = initial_scale
        self.train_steps = train_steps
        self.valid_steps = valid_steps
        self.num_rounds = num_rounds
        self.warmup = warmup

    def init(self, problem, hyper, train, valid, *, params, model_state, key):
        self.steps.method.check(problem)
        self._check_data(train, valid)
        init_key, convert_key, check_key, key, data_key = jax.random.split(key, 5)
        drawn = params is None
        if drawn:
            params, model_state = initialise(problem.inner, hyper, init_key, model_state)
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
        size = self.steps.examples_per_perturbation
        check_losses(
            problem,
            params,
            hyper,
            cut(draw_one(train, check_key), size, "train"),
            cut(draw_one(valid, check_key), size, "valid"),
            check_key,
            model_state,
        )
        trainable = split_trainable(hyper)[0]
        log_scale = initial_log_scale(self.initial_scale, trainable, numbers)
        cursors = first_cursors(train, valid, data_key)
        return self.steps.init(hyper, params, model_state, log_scale, cursors, key, drawn)

    def step(self, problem, state, train, valid):
        self._check_data(train, valid)  # of an iterator, the first alone is known to `init`
        counts = self._num_draws
        train, train_cursor = draw(train, state.cursors.train, counts[0])
        valid, valid_cursor = draw(valid, state.cursors.valid, counts[1])
        at = BothLosses(
            problem,
            state.params,
            state.hyper,
            train[0],
            valid[0],
            state.key,
            state.model_state,
        )
        unreached, left_out, answered = unreached_leaves(at, state.drawn)
        key = jax.random.fold_in(state.key, state.num_steps)
        key = jax.random.split(key, 3)[2]
        train_draws = _by_round(train, self.num_rounds)
        valid_draws = _by_round(valid, self.num_rounds)
        moves = state.num_steps >= self.warmup
        arrays, static = eqx.partition(state, eqx.is_array)

        def go_round(arrays, inputs):
            train_draws, valid_draws, key = inputs
            train_key, valid_key = jax.random.split(key)

            def train_step(arrays, inputs):
                draw, key = inputs
                full, batch = eqx.combine(arrays, static), train.batch(draw)
                new, seen = self.steps.train(problem, full, batch, key, answered)
                return eqx.filter(new, eqx.is_array), seen

            def valid_step(arrays, inputs):
                draw, key = inputs
                full, batch = eqx.combine(arrays, static), valid.batch(draw)
                new, seen = self.steps.validate(problem, full, batch, key, moves, answered)
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
        cursors = Cursors(train_cursor, valid_cursor)
        new = dataclasses.replace(new, cursors=cursors, num_steps=state.num_steps + 1)
        report, good = self._report(trained, validated, unreached, left_out)
        return new, BilevelStep(report, moves & good)

    def params_at(self, state: SelfTuningState) -> Params:
        """The ordinary params that the network gives at the present `hyper`.

        **Arguments:**

        - `state`: the state of a run, as a callback of [`metaopt.solve_bilevel`][]
            receives it.

        **Returns:**

        A pytree like the params of the inner problem, without best-response layers.
        """
        zero = jnp.zeros_like(Coordinates.vector(state.hyper))
        return ordinary(state.params, zero)

    def evaluate(self, problem, state, train, valid):
        params = self.params_at(state)
        key = jax.random.fold_in(state.key, state.num_steps)
        # A batch of the next step, which a run that goes on sees again.
        drawn, _ = draw(valid, state.cursors.valid, 1)
        value, _ = problem.evaluate_outer(
            params, state.hyper, drawn[0], key, state.model_state
        )
        return BilevelEvaluation(value, params, state.model_state)

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        # Each step takes the gradient of one of the losses.
        train = inner_steps(columns)
        gradients = train + self.num_rounds * self.valid_steps
        return Work(gradients=gradients, products=np.zeros_like(train))

    def hyper(self, state):
        return state.hyper

    def solution(self, state):
        return self.params_at(state)

    def _report(
        self,
        trained: Trained,
        validated: Validated,
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
        result = judged(
            mask_result(jnp.any(lost), RESULTS.inner_nonfinite),
            jnp.all(jnp.isfinite(validated.value)),
            jnp.all(validated.good),
        )
        report = Report(
            result=result,
            outer=OuterInfo(last.value, last.aux, last.norm, last.num_zeros, unreached),
            inner=InnerInfo(
                loss=trained.loss[-1],
                residual=trained.norm[-1],
                num_steps=jnp.asarray(self.num_rounds * self.train_steps),
                failed_step=failed_step,
            ),
            derivative=ResponseInfo(left_out),
            adjoint=f"learned response ({type(self.steps.method).__name__})",
        )
        return report, jnp.any(validated.good)

    @property
    def _num_draws(self) -> tuple[int, int]:
        """The batches of both losses in one outer step."""
        return self.num_rounds * self.train_steps, self.num_rounds * self.valid_steps

    def _check_data(self, train: AbstractData, valid: AbstractData) -> None:
        counts = self._num_draws
        for data, name, count in zip((train, valid), ("train", "valid"), counts):
            check_drawn(data, name, count)


class ResponseInfo(AbstractDerivativeInfo):
    """The report of a learned best response.

    **Attributes:**

    - `left_out`: what the derivative leaves out by construction, in words.
    """

    left_out: tuple[str, ...] = eqx.field(static=True)

    def accuracy(self):
        return []

    def rows(self):
        return []

    def scalars(self):
        return {}


def _by_round(drawn: DrawnBatches, num_rounds: int) -> PyTree:
    """The draws with a leading axis of rounds."""
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_rounds, -1, *leaf.shape[1:]), drawn.draws
    )
