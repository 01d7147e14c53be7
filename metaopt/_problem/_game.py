"""The kind of inner problem with several players, each with a loss of its own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._core._tree import split_trainable
from .._core._types import Batch, Hyper, Key, LossFn, ModelState, Params, Vector
from .._jaxpr._dependence import depends
from ._base import AbstractProblem, Evaluation
from ._call import call, check_scalar, describe, start


def _as_losses(losses: Any) -> tuple[LossFn, ...]:
    if not isinstance(losses, (tuple, list)) or not losses:
        raise ValueError(
            "`losses` must be a tuple of functions `loss(params, hyper, batch)`, one for "
            f"each player; got {describe(losses)}."
        )
    for index, loss in enumerate(losses):
        if not callable(loss):
            raise ValueError(
                f"`losses[{index}]` must be a function `loss(params, hyper, batch)`; got "
                f"{describe(loss)}."
            )
    return tuple(losses)


class GameProblem(AbstractProblem):
    r"""An inner game: several players, each of whom minimises a loss of its own in params
    of its own.

    With $p = (p_1, \dots, p_n)$, the field is the tuple of the players' gradients,

    $$\bigl( \nabla_{p_1} loss_1(p, hyper), \;\dots,\; \nabla_{p_n} loss_n(p, hyper)
    \bigr),$$

    which is zero at a differential Nash equilibrium. Its Jacobian is not symmetric: use
    [`metaopt.GMRES`][] or [`metaopt.Dense`][] in an [`metaopt.ImplicitAdjoint`][].
    [`metaopt.Descent`][] moves all players at the same time; it spirals outwards in a
    bilinear game, and converges in one that is convex enough in each player's own params.
    [`metaopt.OptimistixSolver`][] runs a root finder. A zero of the field need not be a
    minimum for any player; check the players' losses where that matters.

    **Arguments:**

    - `losses`: a tuple of functions `loss(params, hyper, batch)`, one for each player,
        where `params` is the tuple of all players' params. Each returns a floating-point
        scalar, and may declare arguments named `key` (a draw of its own) and (with
        `has_state`) `state`.
    - `init_fn`: `init_fn(hyper, key)`, a tuple of each player's initial params. May be
        left out where initial params are handed over at each call.
    - `has_aux`: whether each loss returns `(value, aux)`. The auxiliary output of the
        problem is the tuple of these.
    - `has_state`: whether `init_fn` returns `(params, state)`, and each loss returns
        `(value, state)`, or `(value, state, aux)`. The model state passes from the first
        player to the last.

    **Raises:**

    `ValueError` for losses that are no functions, for params that are not one pytree for
    each player, and for a loss that does not depend on the params of its own player.

    **Example:**

    ```python
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    problem = mo.BilevelProblem(
        mo.GameProblem(
            (
                lambda params, hyper, batch: params[0] ** 2 + hyper * params[0] * params[1],
                lambda params, hyper, batch: (params[1] - 1) ** 2 - params[0] * params[1],
            )
        ),
        lambda params, hyper, batch: params[0] ** 2,
    )
    gradient, report = mo.hypergradient(
        problem, 0.5, params=(jnp.zeros(()), jnp.zeros(())),
        inner=mo.Descent(optax.sgd(0.3), num_steps=100),
        adjoint=mo.ImplicitAdjoint(mo.GMRES()),
    )
    ```
    """

    losses: tuple[LossFn, ...] = eqx.field(converter=_as_losses)
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(default=False, static=True, kw_only=True)
    has_state: bool = eqx.field(default=False, static=True, kw_only=True)
    field_name = "the gradient of a player's loss"

    def init(self, hyper, key):
        return start(self.init_fn, hyper, key)

    def evaluate(self, params, hyper, batch, key, state):
        self._players(params)
        outs = []
        for index in range(len(self.losses)):
            out = self._loss(index, params, hyper, batch, key, state)
            state = out.state
            outs.append(out)
        return self._together(outs, tuple(out.value for out in outs))

    def field(self, params, hyper, batch, key, state):
        players = self._players(params)
        gradients, outs = [], []
        for index in range(len(self.losses)):
            gradient, out = self._gradient(index, params, hyper, batch, key, state)
            state = out.state
            gradients.append(gradient)
            outs.append(out)
        return jax.tree.unflatten(players, gradients), self._together(outs, None)

    @property
    def tags(self):
        return frozenset()

    def _players(self, params: Params) -> Any:
        """The structure of `params` with one leaf for each player."""
        count = len(self.losses)
        if not isinstance(params, tuple) or len(params) != count:
            raise ValueError(
                f"This `GameProblem` has {count} losses, so `params` must be a tuple of "
                f"length {count}, each player's own; got {describe(params)}."
            )
        return jax.tree.structure(params, is_leaf=lambda node: node is not params)

    def _loss(
        self,
        index: int,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key,
        state: ModelState,
    ) -> Evaluation:
        name, own_key = f"losses[{index}]", jax.random.split(key, len(self.losses))[index]
        out = call(self, self.losses[index], name, params, hyper, batch, own_key, state)
        check_scalar(out.value, f"`{name}`")
        return out

    def _gradient(
        self,
        index: int,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key,
        state: ModelState,
    ) -> tuple[Vector, Evaluation]:
        """The gradient of one player's loss in its own params, and its evaluation."""
        players = self._players(params)
        own, rest = split_trainable(params[index])

        def loss(own):
            all_params = list(params)
            all_params[index] = eqx.combine(own, rest)
            moved = jax.tree.unflatten(players, all_params)
            out = self._loss(index, moved, hyper, batch, key, state)
            return out.value, out

        # So that the user's function is called once, here and in the gradient.
        loss = eqx.filter_closure_convert(loss, own)
        if not depends(lambda own: loss(own)[0], own):
            raise ValueError(
                f"`losses[{index}]` does not depend on `params[{index}]`, the params of "
                "its own player. Compute each loss from its player's params; losses and "
                "params must be in the same order."
            )
        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(own)
        return gradient, out

    def _together(self, outs: list[Evaluation], value: Any) -> Evaluation:
        aux = tuple(out.aux for out in outs) if self.has_aux else None
        return Evaluation(value, outs[-1].state, aux)
