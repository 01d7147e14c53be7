"""Descent by any optax transform."""

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._core._tree import split_trainable, tree_norm, tree_sum_abs
from .._core._types import Batch, Hyper, Key, ModelState, Params
from .._core._validate import check_count, check_tolerance
from .._jaxpr._rewrite import carry_conditions
from .._problem import AbstractProblem, AbstractStatePolicy
from ._base import AbstractIterativeSolver, StepOutput
from ._common import check_state_policy, check_stopping, problem_optimality
from ._zero_gradients import with_usable_slopes


Transform = optax.GradientTransformation | optax.GradientTransformationExtraArgs


class Descent(AbstractIterativeSolver):
    """Gradient descent by any optax transform: the inner solver to start with.

    Use it to train a network, and wherever the path matters: learning rates, momenta,
    decay and per-step schedules become outer variables by building the transform from
    `hyper`. For a small, smooth, deterministic problem that is to be solved to high
    accuracy, [`metaopt.OptimistixSolver`][] needs far fewer steps.

    ```python
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    mo.Descent(optax.adam(1e-3), num_steps=200)
    mo.Descent(lambda hyper: optax.sgd(jnp.exp(hyper.log_lr)), num_steps=200)
    mo.Descent(  # a learning rate for each step
        lambda hyper: optax.sgd(lambda step: jnp.exp(hyper.log_lr[step])), num_steps=200
    )
    ```

    The steps follow the field of any inner problem, as if it were a gradient: that of a
    loss; `params - step(params)` of a fixed point, which with `optax.sgd(rate)` is Picard
    iteration relaxed by `rate`; the residual of a root; the gradients of the players of a
    game, who move at the same time. Without a loss, steps of any size need not converge:
    the Jacobian of the field needs eigenvalues with positive real parts, as in a monotone
    problem. Transforms that compare losses are then refused: line searches,
    `optax.lbfgs`, Polyak steps and `reduce_on_plateau`.

    Derivatives pass through the transform. If an elementary operation in its update has no
    finite derivative (the square root in Adam at a gradient entry of exactly zero) it is
    taken as zero, and forward values are unchanged. That includes schedules, which are
    evaluated in the update, and not what the function computes from `hyper`. The same holds
    where a derivative is finite and useless: at a gradient entry that is zero, or zero but
    for rounding, and has always been, the slope of Adam is `1 / eps`, right within `eps` of
    zero and nowhere else. Reports count these entries (`num_flat`). To have their
    derivative, give an `eps` of at least a hundredth of the largest gradient entry, or
    start from values that are not zero.

    **Arguments:**

    - `transform`: an optax gradient transformation, or a function `hyper -> transform`.
    - `num_steps`: the number of steps, and the most that are taken.
    - `atol`: stop once the Euclidean norm of the gradient (or field) is at most this;
        `None` takes all the steps. Needs inner data without minibatches.
    - `state_policy`: what becomes of model state, if the problem has any:
        [`metaopt.nn.CarriedState`][], [`metaopt.nn.FrozenState`][] or
        [`metaopt.nn.PerStepState`][].

    **Raises:**

    `ValueError` for arguments out of range, and where the transform asks for a loss and the
    inner problem has none.
    """

    transform: Transform | Callable[[Hyper], Transform]
    num_steps: int = eqx.field(static=True)
    atol: float | None = eqx.field(static=True)
    state_policy: AbstractStatePolicy | None

    def __init__(
        self,
        transform: Transform | Callable[[Hyper], Transform],
        num_steps: int,
        *,
        atol: float | None = None,
        state_policy: AbstractStatePolicy | None = None,
    ):
        if isinstance(transform, optax.MultiSteps):
            transform = transform.gradient_transformation()
        self.transform = transform
        self.num_steps = num_steps
        self.atol = atol
        self.state_policy = state_policy

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        check_tolerance(self.atol, "atol")
        if inspect.isfunction(self.transform) and _is_of_optax(self.transform):
            raise ValueError(
                f"`transform` is the function `optax.{self.transform.__name__}` itself. "
                f"Call it: `optax.{self.transform.__name__}(...)`, or build it from "
                "`hyper`: `lambda hyper: optax.sgd(hyper.rate)`."
            )
        if not callable(self.transform) and not _is_transform(self.transform):
            raise ValueError(
                "`transform` must be an optax transform such as `optax.sgd(0.1)`, or a "
                f"function `hyper -> transform`; got {self.transform!r}."
            )

    @property
    def stops_early(self):
        return self.atol is not None

    @property
    def depends_on_hyper(self) -> bool:
        """Whether the transform is built from `hyper`."""
        return not _is_transform(self.transform)

    def check(self, problem, data):
        check_state_policy(self, problem)
        data.check(self.num_steps)
        check_stopping(self, data, "atol")

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def init(self, problem, params, hyper):
        state = self._build(hyper).init(params)
        is_lookahead = lambda node: isinstance(node, optax.LookaheadState)
        if any(map(is_lookahead, jax.tree.leaves(state, is_leaf=is_lookahead))):
            raise ValueError(
                "`optax.lookahead` keeps two sets of params, `optax.LookaheadParams`, and "
                "`metaopt.Descent` has one. Hand over its fast optimizer alone."
            )
        return state

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        trainable, static = split_trainable(params)
        gradient, out = problem.field(params, hyper, batch, key, model_state)

        # Built outside: what the user computes from `hyper` keeps its own derivatives.
        transform = self._build(hyper)
        functions = _functions(problem, static, hyper, batch, key, model_state)

        def update(gradient, solver_state, trainable, value):
            extra = {"grad": gradient, **functions}
            if problem.has_loss:
                extra["value"] = value
            taken = _taken(transform.update, extra)
            with _loss_needed(problem):
                return transform.update(gradient, solver_state, trainable, **taken)

        updates, solver_state, num_flat = carry_conditions(with_usable_slopes(update))(
            gradient, solver_state, trainable, out.value
        )
        trainable = optax.apply_updates(trainable, updates)
        converged = None
        if self.atol is not None:
            converged = tree_norm(gradient) <= jnp.asarray(self.atol)
        # Not the loss: the gradient is there, and a loss that nobody reads costs nothing.
        monitor = tree_sum_abs(jax.lax.stop_gradient(gradient))
        output = StepOutput(
            monitor, converged, out.state, out.aux, loss=out.value, num_flat=num_flat
        )
        return eqx.combine(trainable, static), solver_state, output

    def _build(self, hyper: Hyper) -> optax.GradientTransformationExtraArgs:
        transform: Any = self.transform
        if not _is_transform(transform):
            transform = transform(hyper)
            if isinstance(transform, optax.MultiSteps):
                transform = transform.gradient_transformation()
            if not _is_transform(transform):
                raise ValueError(
                    "The function given to `Descent` must return an optax transform "
                    f"such as `optax.sgd(0.1)`; it returned {transform!r}."
                )
        return optax.with_extra_args_support(transform)


def _functions(
    problem: AbstractProblem,
    static: Params,
    hyper: Hyper,
    batch: Batch,
    key: Key,
    model_state: ModelState,
) -> dict[str, Callable]:
    """The loss and the field as functions of the trainable params, by the names under
    which transforms ask for them."""

    # Line searches hand on to it what else they are given, by name.
    def value_of(trainable, *, obj_fn=None, grad_fn=None):
        del obj_fn, grad_fn
        if not problem.has_loss:
            raise _NoLoss
        full = eqx.combine(trainable, static)
        return problem.evaluate(full, hyper, batch, key, model_state).value

    def gradient_of(trainable, _=None):
        full = eqx.combine(trainable, static)
        return problem.field(full, hyper, batch, key, model_state)[0]

    # The names that Sophia and SAM (`opaque_mode`) have for them are the last two.
    return {"value_fn": value_of, "obj_fn": value_of, "grad_fn": gradient_of}


# Python's text for an argument of that name that was not given.
_MISSING_LOSS = r"missing \d+ required .*'value'"


class _NoLoss(Exception):
    """A transform asked for a loss, and the inner problem has none."""


@contextlib.contextmanager
def _loss_needed(problem: AbstractProblem):
    """Names the problem where a transform asks for a loss that it does not have."""
    try:
        yield
    except (_NoLoss, TypeError) as error:
        asked = isinstance(error, _NoLoss) or re.search(_MISSING_LOSS, str(error))
        if problem.has_loss or not asked:
            raise
        raise ValueError(
            f"The transform of `Descent` asks for a loss, and `{type(problem).__name__}` "
            "has none. Line searches, `optax.lbfgs`, Polyak steps and the like compare "
            "losses: use a transform of the gradient alone, such as `optax.sgd` or "
            "`optax.adam`."
        ) from error


def _taken(function: Callable, extra: dict[str, Any]) -> dict[str, Any]:
    """The arguments in `extra` that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return extra
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in extra.items() if name in names}


def _is_of_optax(function: Callable) -> bool:
    return (function.__module__ or "").split(".")[0] == "optax"  # None under `exec`


def _is_transform(x: Any) -> bool:
    # A named tuple of two functions: not callable itself.
    return isinstance(x, optax.GradientTransformation)
