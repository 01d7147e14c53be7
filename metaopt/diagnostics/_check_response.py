"""Checking a learned best response against the implicit one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._best_response import ordinary
from .._bilevel import Coordinates, SelfTuningState
from .._core._tree import leaf_names, split_trainable, tree_dot
from .._core._types import Batch, Hyper, Key, ModelState, Params, Vector
from .._core._validate import (
    canonical_arrays,
    canonical_key,
    check_count,
    check_kind,
    check_tolerance,
)
from .._core._warn import warn
from .._data import AbstractData, as_data
from .._implicit import (
    AbstractCurvature,
    cheapest_curvature,
    ImplicitSystem,
)
from .._jaxpr._dependence import without_derivative
from .._linear import AbstractLinearSolver
from .._problem import AbstractProblem, BilevelProblem
from .._report import BilevelSolution
from .._solver import Optimality, problem_optimality
from ._response_check import ResponseCheck


_Numbers = Float[Array, " num_hyper"]

_MAX_NUMBERS = 100
_LOW_COSINE = 0.25
_LOW_ERROR = 0.2
_UNSURE = 0.25  # of the length of the slopes


def check_response(
    problem: BilevelProblem,
    solution: BilevelSolution | SelfTuningState,
    train: Any,
    valid: Any,
    *,
    linear_solver: AbstractLinearSolver | None = None,
    curvature: AbstractCurvature | None = None,
    step: float | None = None,
    num_draws: int = 8,
    num_directions: int | None = None,
    key: Key | None = None,
) -> ResponseCheck:
    r"""Compare a learned best response with that of the implicit function theorem,

    $$\frac{d\,params^*}{d\,hyper} = - H^{-1} \, \partial_{hyper} \nabla_{params} loss ,$$

    by one linear solve for each number in `hyper`, at the end of a self-tuning run. Warns
    where the two would lead `hyper` in different directions, and where that is uncertain.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `solution`: what [`metaopt.solve_bilevel`][] returned, or its state.
    - `train`, `valid`: what the losses are evaluated on, as a whole. Some hundreds of
        rows will do.
    - `linear_solver`: how the systems are solved; by default `CG(rtol=1e-2)` with the
        curvature of Gauss and Newton where the inner problem states its predictions, and
        `MINRES(rtol=1e-2)` with the Hessian where it does not.
    - `curvature`: what stands for the Hessian.
    - `step`: with a length, $\partial_{hyper}$ is a central difference of that step in
        each number of `hyper`. Needed where `hyper` acts through operations without a
        derivative: numbers of things, dropout masks (whose rate has a derivative where it
        rescales what is left, so that nothing shows that there is more). By default it is
        exact.
    - `num_draws`: over how many draws of its randomness (dropout masks, augmentation) the
        gradient of the training loss is averaged; at least 2. The
        curvature is that of the first.
    - `num_directions`: so many random unit directions instead of all numbers in `hyper`;
        at least 5. Slopes and cosines are then over these.
    - `key`: for those draws and directions.

    **Returns:**

    A [`metaopt.diagnostics.ResponseCheck`][].

    **Raises:**

    `ValueError` for arguments that do not fit, and without `step` for a leaf of `hyper`
    whose derivative is zero by construction.
    """
    check_kind(problem, BilevelProblem, "problem", "metaopt.BilevelProblem(...)")
    check_tolerance(step, "step")
    if step == 0:
        raise ValueError("`step` must be positive, or `None` for no difference; got 0.")
    check_count(num_draws, "num_draws", 2)  # of one, nobody knows how certain it is
    if num_directions is not None:
        # Of one or two any response agrees with any other, by chance.
        check_count(num_directions, "num_directions", 5)
    state = solution.state if isinstance(solution, BilevelSolution) else solution
    check_kind(state, SelfTuningState, "solution", "the solution of a self-tuning run")
    key = canonical_key(key)
    names, directions = _directions(state, num_directions, key)
    if curvature is None:
        curvature = cheapest_curvature(problem.inner)
    check_kind(curvature, AbstractCurvature, "curvature", "metaopt.linear.GaussNewton()")
    if linear_solver is None:
        linear_solver = curvature.stationary_solver(1e-2)
    check_kind(linear_solver, AbstractLinearSolver, "linear_solver", "metaopt.CG()")
    measured = _measure(
        problem,
        state,
        as_data(canonical_arrays(train, "train"), "train"),
        as_data(canonical_arrays(valid, "valid"), "valid"),
        linear_solver,
        curvature,
        step,
        directions,
        jax.random.split(key, num_draws),
    )
    columns = {name: np.asarray(m, np.float64) for name, m in measured.items()}
    check = _checked(names, **columns)
    if not check.certain:
        warn(
            "Whether the learned best response and the implicit one would lead `hyper` the "
            "same way is uncertain. Print the `ResponseCheck` to see why."
        )
    elif not check.agree:
        warn(
            "The learned best response and the implicit one would lead `hyper` in "
            f"different directions (cosine {check.slope_cosine:.2g} between their "
            "hypergradients). Print the `ResponseCheck` to see which numbers."
        )
    return check


def _directions(state: SelfTuningState, count: int | None, key: Key):
    trainable = split_trainable(state.hyper)[0]
    numbers = Coordinates.vector(state.hyper)
    if count is not None:
        random = jax.random.normal(key, (count, numbers.size), numbers.dtype)
        directions = random / jnp.linalg.norm(random, axis=1, keepdims=True)
        return tuple(f"direction {i}" for i in range(count)), directions
    if numbers.size > _MAX_NUMBERS:
        raise ValueError(
            f"`hyper` holds {numbers.size} numbers, each of which takes a linear solve. "
            "Write `num_directions=10` to check random directions instead."
        )
    names = []
    leaves = jax.tree.leaves(trainable)
    for name, leaf in zip(leaf_names(trainable, "hyper"), leaves, strict=True):
        if leaf.ndim == 0:
            names.append(name)
        else:
            names += [f"{name}{list(index)}" for index in np.ndindex(leaf.shape)]
    return tuple(names), jnp.eye(numbers.size, dtype=numbers.dtype)


class _TrainingGradient(eqx.Module):
    """The gradient of the training loss in the params, a function of the trainable part
    of `hyper`, averaged over random draws."""

    inner: AbstractProblem
    params: Params
    hyper: Hyper
    batch: Batch
    model_state: ModelState
    keys: Key

    def system(self, curvature: AbstractCurvature) -> ImplicitSystem:
        """The linear system of its first draw."""
        return ImplicitSystem.at(
            self.inner,
            self.hyper,
            self.params,
            self.batch,
            key=self.keys[0],
            model_state=self.model_state,
            curvature=curvature,
        )

    def __call__(self, hyper: Vector, dual: Vector) -> tuple[Vector, Array]:
        """Its mean, and for each draw its product with `dual`."""
        params = split_trainable(self.params)[0]

        def one(key):
            of_draw = self._of_draw(key)(params, hyper)
            return of_draw, tree_dot(of_draw, dual)

        draws, dots = jax.lax.map(one, self.keys)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), draws), dots

    def along(
        self, direction: _Numbers, dual: Vector, step: float | None
    ) -> tuple[Vector, Array]:
        """The derivative of both along a direction, or their difference over that step."""
        numbers = Coordinates.vector(self.hyper)
        at = lambda numbers: self(Coordinates(self.hyper).trainable(numbers), dual)
        if step is None:
            return jax.jvp(at, (numbers,), (direction,))[1]
        ahead, behind = (at(numbers + s * direction) for s in (step, -step))
        width = 2 * step
        return jax.tree.map(lambda a, b: (a - b) / width, ahead, behind)

    def check_derivative(self, dual: Vector) -> None:
        """Raise where a leaf of `hyper` acts on it and has no derivative."""
        hyper = split_trainable(self.hyper)[0]
        # Leaf by leaf: in one vector, any leaf with a derivative would hide the others.
        of_hyper = lambda hyper: self(hyper, dual)[0]
        names, marks = leaf_names(hyper, "hyper"), without_derivative(of_hyper, hyper)
        unseen = [f"`{name}`" for name, mark in zip(names, marks, strict=True) if mark]
        if unseen:
            raise ValueError(
                f"The gradient of the training loss depends on {', '.join(unseen)} only "
                "through operations without a derivative (rounding, comparisons, random "
                "draws), so that the implicit response would be zero. Write `step=0.3`, "
                "which takes differences of that step in `hyper`."
            )

    def _of_draw(self, key: Key) -> Optimality:
        return problem_optimality(
            self.inner, self.params, self.hyper, self.batch, key, self.model_state
        )


def _outer_gradient(
    problem: BilevelProblem, params: Params, state: SelfTuningState, batch: Batch, key: Key
) -> Vector:
    """The gradient of the outer loss in the params."""
    trainable, static = split_trainable(params)

    def outer(trainable):
        full = eqx.combine(trainable, static)
        return problem.evaluate_outer(full, state.hyper, batch, key, state.model_state)[0]

    return jax.grad(outer)(trainable)


def _learned_along(state: SelfTuningState, direction: _Numbers) -> Vector:
    """The derivative of the learned response along a direction in `hyper`."""
    learned = lambda change: split_trainable(ordinary(state.params, change))[0]
    return jax.jvp(learned, (jnp.zeros_like(direction),), (direction,))[1]


@eqx.filter_jit
def _measure(
    problem: BilevelProblem,
    state: SelfTuningState,
    train: AbstractData,
    valid: AbstractData,
    linear_solver: AbstractLinearSolver,
    curvature: AbstractCurvature,
    step: float | None,
    directions: jax.Array,
    keys: Key,
) -> dict[str, jax.Array]:
    """The parts of a check, each an array over the directions."""
    inner = problem.inner
    unmoved = jnp.zeros_like(Coordinates.vector(state.hyper))
    params = ordinary(state.params, unmoved)
    gradient = _TrainingGradient(
        inner, params, state.hyper, train.full(), state.model_state, keys
    )
    system = gradient.system(curvature).prepare(linear_solver)
    negative = lambda vector: jax.tree.map(jnp.negative, vector)
    outer_gradient = _outer_gradient(problem, params, state, valid.full(), keys[0])
    # A second way to the slopes of the implicit response, for each draw alone.
    dual = system.solve(negative(outer_gradient)).value
    if step is None:
        gradient.check_derivative(dual)
    slope_of = lambda moved: jnp.sum(ravel_pytree(outer_gradient)[0] * moved)

    def along(direction):
        crossed, dots = gradient.along(direction, dual, step)
        solution = system.solve(negative(crossed))
        implicit = ravel_pytree(solution.value)[0]
        learned = ravel_pytree(_learned_along(state, direction))[0]
        implicit_slope = slope_of(implicit)
        # The effect of chance, and the result of the linear solver.
        chance = jnp.std(dots) / (len(dots) - 1) ** 0.5
        return {
            "dot": jnp.sum(learned * implicit),
            "learned": jnp.sum(learned**2),
            "implicit": jnp.sum(implicit**2),
            "difference": jnp.sum((learned - implicit) ** 2),
            "slope": slope_of(learned),
            "implicit_slope": implicit_slope,
            "slope_error": jnp.hypot(chance, implicit_slope - jnp.mean(dots)),
            "residual": solution.residual,
        }

    return jax.lax.map(along, directions)


def _checked(
    names,
    dot,
    learned,
    implicit,
    difference,
    slope,
    implicit_slope,
    slope_error,
    residual,
):
    length = np.linalg.norm(implicit_slope)
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = np.linalg.norm(slope) * np.linalg.norm(implicit_slope)
        slope_cosine = float(np.sum(slope * implicit_slope) / slopes)
        jacobian_error = float(np.sqrt(difference.sum() / implicit.sum()))
        return ResponseCheck(
            names=names,
            learned_norm=np.sqrt(learned),
            implicit_norm=np.sqrt(implicit),
            cosine=dot / np.sqrt(learned * implicit),
            relative_error=np.sqrt(difference / implicit),
            jacobian_error=jacobian_error,
            jacobian_cosine=float(dot.sum() / np.sqrt(learned.sum() * implicit.sum())),
            learned_slope=slope,
            implicit_slope=implicit_slope,
            slope_cosine=slope_cosine,
            slope_error=slope_error,
            linear_residual=residual,
            # NaN, from a response of zero length, fails. At an optimum both slopes are
            # near zero, and only the responses themselves can be compared.
            agree=bool(slope_cosine >= _LOW_COSINE or jacobian_error <= _LOW_ERROR),
            certain=bool(np.linalg.norm(slope_error) <= _UNSURE * length),
        )
