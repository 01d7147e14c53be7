"""Whether a training is smooth enough in `hyper` for a derivative to say anything."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .._core._results import first_failure, RESULTS
from .._core._tree import split_trainable
from .._core._types import FloatScalar, Hyper, Key, ModelState, Params, PyTree
from .._core._validate import (
    canonical_arrays,
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_kind,
    check_params,
    check_tolerance,
    DESCENT_EXAMPLE,
)
from .._data import AbstractData, as_data
from .._problem import AbstractProblem, initialise
from .._report import raise_on_failure, table, verdict
from .._solver import AbstractSolver, InnerSolve


class SmoothnessCheck(eqx.Module):
    """A score of how smooth a training is along one direction of `hyper`. `print` it.

    **Attributes:**

    - `score`: from -1 to 1. Near 1, the params go on moving where they were moving: a
        derivative predicts them. Near 0 or below, one solution says nothing of the next.
    - `movements`: the Euclidean distances between the three solutions, `(2,)`.
    - `result`: how the three solves ended; the first failure.
    """

    score: FloatScalar
    movements: jax.Array
    result: RESULTS

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        first, second = np.asarray(self.movements)
        rows = [
            ("score", f"{float(self.score):.4f}"),
            ("movements of the params", f"{first:.4g}, then {second:.4g}"),
        ]
        return table("Smoothness of a training", rows, verdict(self.result))


def check_smoothness(
    problem: AbstractProblem,
    hyper: Hyper,
    train: Any = None,
    *,
    solver: AbstractSolver,
    params: Params | None = None,
    direction: PyTree | None = None,
    step: float = 1e-2,
    key: Key | None = None,
    model_state: ModelState = None,
    throw: bool = True,
) -> SmoothnessCheck:
    r"""Score how smooth the solution of an inner problem is along a direction of `hyper`.

    Use it before a long training is differentiated, and to compare settings: a derivative
    of a training that is not smooth is exact and useless. It takes three trainings and no
    derivative. With $\Delta_1 = params(h + s v) - params(h)$ and
    $\Delta_2 = params(h + 2 s v) - params(h + s v)$ the score is the agreement of signs,
    weighted by the movement:

    $$\sum_i \frac{|\Delta_{1,i}|}{\|\Delta_1\|_1} \,
    \mathrm{sign}(\Delta_{1,i}) \, \mathrm{sign}(\Delta_{2,i})$$

    ```python
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    problem = mo.InnerProblem(lambda params, hyper, data: jnp.sum((params - hyper) ** 2))
    check = mo.diagnostics.check_smoothness(
        problem, jnp.ones(3), params=jnp.zeros(3),
        solver=mo.Descent(optax.sgd(0.1), num_steps=20),
    )
    print(check.score.round(3))  # 1.0
    ```

    **Arguments:**

    - `problem`, `hyper`, `train`, `solver`, `params`, `key`, `model_state`: as in
        [`metaopt.solve_inner`][].
    - `direction`: a pytree like the floating-point arrays of `hyper`, such as a
        hypergradient; it is scaled to length 1. By default random.
    - `step`: the length of a movement of `hyper`: that of the outer steps to be taken.
    - `throw`: whether a failure of a training raises.

    **Returns:**

    A [`metaopt.diagnostics.SmoothnessCheck`][]. Its score is NaN where nothing moves.

    **Raises:**

    `ValueError` for arguments that do not fit; [`metaopt.SolveError`][] under `throw` for
    a training that fails.

    ??? cite "Source"

        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry: *Optimizing ML training with
        metagradient descent*, 2025, arXiv 2503.13751: empirical metasmoothness.
    """
    check_kind(problem, AbstractProblem, "problem", "metaopt.InnerProblem(loss)")
    check_kind(solver, AbstractSolver, "solver", DESCENT_EXAMPLE)
    check_tolerance(step, "step", optional=False)
    if step == 0:
        raise ValueError("`step` must be positive; got 0.")
    hyper = canonical_hyper(hyper)
    if params is not None:
        params = canonical_params(params)
    data = as_data(canonical_arrays(train, "train"), "train")
    trainable, static = split_trainable(hyper)
    flat, unravel = ravel_pytree(trainable)
    along = step * _unit(direction, trainable, flat)
    key = canonical_key(key)

    def solution(count):
        moved = eqx.combine(unravel(flat + count * along), static)
        return _train(problem, moved, params, data, solver, key, model_state)

    solutions, results = zip(*(solution(count) for count in range(3)))
    first, second = solutions[1] - solutions[0], solutions[2] - solutions[1]
    weights = jnp.abs(first) / jnp.sum(jnp.abs(first))
    check = SmoothnessCheck(
        score=jnp.sum(weights * jnp.sign(first) * jnp.sign(second)),
        movements=jnp.stack([jnp.linalg.norm(first), jnp.linalg.norm(second)]),
        result=first_failure(*results),
    )
    return raise_on_failure(check, check.result, throw, show=check)


def _unit(direction: PyTree | None, trainable: PyTree, flat: jax.Array) -> jax.Array:
    if direction is None:
        drawn = np.random.default_rng(0).standard_normal(flat.size)
        return jnp.asarray(drawn / np.linalg.norm(drawn), flat.dtype)
    given = split_trainable(jax.tree.map(jnp.asarray, direction))[0]
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if shapes(given) != shapes(trainable):
        raise ValueError(
            "`direction` must have the structure and the shapes of the floating-point "
            f"arrays of `hyper`, {shapes(trainable)}; got {shapes(given)}."
        )
    vector = ravel_pytree(given)[0].astype(flat.dtype)
    length = float(jnp.linalg.norm(vector))
    if not 0 < length < float("inf"):
        raise ValueError(f"`direction` must be finite and not zero; its norm is {length}.")
    return vector / length


@eqx.filter_jit
def _train(
    problem: AbstractProblem,
    hyper: Hyper,
    params: Params | None,
    data: AbstractData,
    solver: AbstractSolver,
    key: Key,
    model_state: ModelState,
) -> tuple[jax.Array, RESULTS]:
    solver.check(problem, data)
    init_key, solve_key = jax.random.split(key)
    if params is None:
        params, model_state = initialise(problem, hyper, init_key, model_state)
        check_params(params)
    solve = InnerSolve(problem, solver, data, solve_key)
    outcome = solve.primal(params, hyper, model_state)
    return ravel_pytree(split_trainable(outcome.params)[0])[0], outcome.result
