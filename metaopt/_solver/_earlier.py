"""The state of an earlier solve, from which another one goes on."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._core._tree import same_structs, tree_where_arrays
from .._core._types import BoolScalar, Vector
from ._base import AbstractIterativeSolver, AbstractSolver
from ._descent import Descent
from ._exact_momentum import AbstractExactMomentum, ReversibleState
from ._fixed_point import AbstractFixedPointSolver


_Injected = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


class Earlier(eqx.Module):
    """The state of a solver at the end of an earlier solve.

    **Attributes:**

    - `solver_state`: momenta, averages, the count of steps and the like.
    - `goes_on`: whether to go on from it or to begin anew; `None` always goes on.
    """

    solver_state: Any
    goes_on: BoolScalar | None = None

    def state(self, solver: AbstractIterativeSolver, params: Vector, fresh: Any) -> Any:
        """The state to start from.

        **Arguments:**

        - `solver`: that of the solve which begins.
        - `params`: the trainable part of the params that it starts from.
        - `fresh`: the state with which it would begin anew.

        **Raises:**

        `ValueError` for the state of another solver or of other params.
        """
        state = self.solver_state
        if not same_structs(state, fresh):
            raise ValueError(
                "`solver_state` does not fit the solver and the params: it must be the "
                "`solver_state` of a solution of the same solver, with params of the same "
                f"shapes and dtypes. Expected {eqx.tree_pformat(fresh)}; got "
                f"{eqx.tree_pformat(state)}."
            )
        if isinstance(solver, AbstractExactMomentum):
            state = _exact(solver, params, fresh, state)
        elif isinstance(solver, Descent) and solver.depends_on_hyper:
            state = _with_settings(fresh, state)
        if self.goes_on is None:
            return state
        return tree_where_arrays(self.goes_on, state, fresh)


def can_go_on(solver: AbstractSolver) -> bool:
    """Whether the state of a solver means something to the next solve.

    Solvers of fixed points remember residuals of the map that they solved.
    """
    if isinstance(solver, AbstractFixedPointSolver):
        return False
    return isinstance(solver, AbstractIterativeSolver)


def _with_settings(fresh: Any, state: Any) -> Any:
    """`state` with the settings that `optax.inject_hyperparams` computed from `hyper`."""
    is_injected = lambda node: isinstance(node, _Injected)

    def renewed(new, old):
        if not is_injected(new):
            return old
        inner = _with_settings(new.inner_state, old.inner_state)
        return old._replace(hyperparams=new.hyperparams, inner_state=inner)

    return jax.tree.map(renewed, fresh, state, is_leaf=is_injected)


def _exact(
    solver: AbstractExactMomentum,
    params: Vector,
    fresh: ReversibleState,
    state: ReversibleState,
) -> ReversibleState:
    """`state` at the given params: all of its digits where these are the params reached,
    and learning rates and momenta from the first on."""
    leaves = jax.tree.leaves(params)
    reached = jax.tree.leaves(solver.params_at(state.exact, params))
    position = [
        jnp.where(at == leaf, old, new)
        for at, leaf, old, new in zip(
            reached, leaves, state.exact.position, fresh.exact.position, strict=True
        )
    ]
    exact = eqx.tree_at(
        lambda e: (e.position, e.height), state.exact, (position, fresh.exact.height)
    )
    where = lambda s: (s.exact, s.count, s.in_range)
    in_range = state.in_range & fresh.in_range
    return eqx.tree_at(where, state, (exact, fresh.count, in_range))
