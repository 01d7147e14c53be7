"""Losses that depend on nothing."""

from collections.abc import Callable, Sequence

import equinox as eqx

from .._core._tree import leaf_names, split_trainable
from .._core._types import (
    Batch,
    FloatScalar,
    Hyper,
    Key,
    ModelState,
    Params,
    PyTree,
    Vector,
)
from .._jaxpr._dependence import depends
from .._problem import BilevelProblem, initialise


class BothLosses(eqx.Module):
    """The two losses at one point: params, outer variables, one batch for each loss.

    **Attributes:**

    - `problem`, `params`, `hyper`, `model_state`: the problem and the point.
    - `train`, `valid`: a batch for the inner and one for the outer loss.
    - `key`: one draw of the randomness of both.
    """

    problem: BilevelProblem
    params: Params
    hyper: Hyper
    train: Batch
    valid: Batch
    key: Key
    model_state: ModelState

    @property
    def names(self) -> list[str]:
        """The name of each leaf of `hyper` that can be tuned."""
        return trainable_names(self.hyper)

    @property
    def trainable(self) -> Vector:
        """The part of `hyper` that can be tuned."""
        return split_trainable(self.hyper)[0]

    def field(self, trainable: Vector) -> Vector:
        """The field of the inner problem as a function of the outer variables."""
        inner, at = self.problem.inner, self._hyper_at(trainable)
        state = self.model_state
        return inner.field(self.params, at, self.train, self.key, state)[0]

    def outer(self, trainable: Vector) -> FloatScalar:
        """The outer loss as a function of the outer variables."""
        return self._outer(self.params, self._hyper_at(trainable))

    def start(self, trainable: Vector) -> Vector:
        """The initial params that the problem draws, as a function of the outer
        variables."""
        at = self._hyper_at(trainable)
        start = initialise(self.problem.inner, at, self.key)
        return eqx.filter(start, eqx.is_inexact_array)

    def check_losses(self) -> None:
        """Raise a `ValueError` where a loss does not depend on the params."""
        moving, fixed = split_trainable(self.params)
        inner = self.problem.inner

        def inner_loss(moving):
            params = eqx.combine(moving, fixed)
            args = params, self.hyper, self.train, self.key, self.model_state
            return inner.evaluate(*args).value

        if inner.has_loss:
            check_inner_loss(inner_loss, moving)
        outer_loss = lambda moving: self._outer(eqx.combine(moving, fixed), self.hyper)
        check_outer_loss(outer_loss, moving)

    def _outer(self, params: Params, hyper: Hyper) -> FloatScalar:
        args = params, hyper, self.valid, self.key, self.model_state
        return self.problem.evaluate_outer(*args)[0]

    def _hyper_at(self, trainable: Vector) -> Hyper:
        return eqx.combine(trainable, split_trainable(self.hyper)[1])


def trainable_names(hyper: Hyper, root: str = "hyper") -> list[str]:
    """The name of each leaf of `hyper` that can be tuned."""
    return leaf_names(split_trainable(hyper)[0], root)


def check_inner_loss(loss: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Raise a `ValueError` unless the inner loss depends on the params."""
    if not depends(loss, params):
        raise ValueError(
            "The inner loss does not depend on `params`, so there is nothing to "
            "solve. Compute it from its first argument."
        )


def check_outer_loss(loss: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Raise a `ValueError` unless the outer loss depends on the params."""
    if not depends(loss, params):
        raise ValueError(
            "The outer loss does not depend on `params`, so the inner problem has no "
            "effect on it. Compute it from its first argument."
        )


def check_tunable(
    names: Sequence[str],
    idle: Sequence[str],
    held: Sequence[str] = (),
    *,
    also: str = "",
    remark: str = "",
) -> None:
    """Raise a `ValueError` where no leaf of `hyper` has a derivative.

    **Arguments:**

    - `names`: all leaves of `hyper`.
    - `idle`: those without influence.
    - `held`: those that are held constant by a `stop_gradient` of the user.
    - `also`, `remark`: more about the solver, within the sentence and after it.
    """
    if len(idle) + len(held) < len(names):
        return
    if held:
        raise ValueError(
            f"`{'`, `'.join(held)}` acts on the losses only behind "
            "`jax.lax.stop_gradient`, as the rate of `equinox.nn.Dropout` does: it has "
            "influence and no derivative, so there is nothing that a hypergradient could "
            "tune. Use `metaopt.SelfTuningSolver`, which tunes such leaves from samples, "
            "or take the `stop_gradient` away."
        )
    raise ValueError(
        f"Neither loss depends on `hyper`{also}: there is nothing to tune. Compute the "
        f"inner or the outer loss from `hyper`.{remark}"
    )
