"""The base of fixed-point solvers: applying the map and judging the residual."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array

from .._core._results import mask_result, RESULTS
from .._core._tree import split_trainable, tree_dtype
from .._core._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._core._validate import check_count, check_flag, check_tolerance
from .._data import AbstractData
from .._problem import AbstractFixedPointProblem, AbstractProblem
from ._base import AbstractBestIterateSolver, AbstractIterativeSolver, StepOutput
from ._common import check_state_policy, check_stopping, problem_optimality
from ._examples import Examples


_FEW_STEPS = 10  # of which none says that a solve stalls
_MUCH_LARGER = 1e3  # than where the steps began
_ROUNDING = 10  # units of it, below which a residual says nothing


class Applied(eqx.Module):
    """The map of a fixed-point problem, applied once.

    **Attributes:**

    - `params`, `value`: the trainable part of the params, and of what the map gave.
    - `residual`: `value - params`.
    - `norm`: the norm of the residual, one for each fixed point; without derivative.
    - `met`: where it meets the tolerance; `None` where none was asked for.
    - `settled`: where it is met, or the residual is nothing but rounding.
    - `examples`: how many fixed points there are.
    - `apply`: the map, as a function of such a vector.
    """

    params: Vector
    value: Vector
    residual: Vector
    norm: Array
    met: Array | None
    settled: Array
    examples: Examples
    apply: Callable[[Vector], Vector]


class Begun(eqx.Module):
    """The start of the steps, and their number so far.

    **Attributes:**

    - `step`: the number of steps.
    - `size`: the norm of the initial params and of the residual there, summed: at least
        that of the map; one for each fixed point.
    """

    step: IntScalar
    size: Array

    @classmethod
    def at_start(cls, params: Vector, examples: Examples) -> "Begun":
        """Before the first step."""
        size = jnp.zeros(examples.shape, tree_dtype(params))
        return cls(jnp.zeros((), int), size)


class AbstractFixedPointSolver(AbstractIterativeSolver):
    """A solver of fixed-point problems that applies their map in each step."""

    rtol: eqx.AbstractVar[float | None]
    atol: eqx.AbstractVar[float]
    per_example: eqx.AbstractVar[bool]
    budget: eqx.AbstractVar[IntScalar | None]

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        check_tolerance(self.rtol, "rtol")
        check_tolerance(self.atol, "atol", optional=False)
        check_flag(self.per_example, "per_example")

    @property
    def stops_early(self):
        return self.rtol is not None or self.budget is not None

    def with_budget(self, budget: IntScalar | int) -> "AbstractFixedPointSolver":
        """The same, with another budget of steps."""
        return dataclasses.replace(self, budget=budget)

    def check(self, problem: AbstractProblem, data: AbstractData) -> None:
        name = type(self).__name__
        if not isinstance(problem, AbstractFixedPointProblem):
            raise ValueError(
                f"`{name}` solves fixed-point problems alone, not a "
                f"`{type(problem).__name__}`. Use `metaopt.Descent` or "
                "`metaopt.OptimistixSolver`."
            )
        check_state_policy(self, problem)
        data.check(self.num_steps)
        if self.rtol is not None:
            check_stopping(self, data, "rtol")

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def applied(
        self, problem, params, hyper, batch, key, model_state, begun: Begun
    ) -> tuple[Applied, StepOutput, Begun]:
        """The map at some params, its residual and its norms.

        A map without a fixed point may drive params to where any residual is small in
        comparison with them. So what the residual is compared with is not much more than
        the size that params began with.

        **Arguments:**

        - `begun`: of the steps before this one.
        - all others: as for a step of any solver.

        **Returns:**

        The map, the output of the step, and `begun` for the next one.
        """
        old, static = split_trainable(params)

        def evaluate(trainable):
            full = eqx.combine(trainable, static)
            return problem.evaluate(full, hyper, batch, key, model_state)

        out = evaluate(old)
        value = split_trainable(out.value)[0]
        residual = jax.tree.map(jnp.subtract, value, old)
        examples = Examples.of(old, self.per_example)
        fixed = jax.lax.stop_gradient((old, residual))
        size, norm = map(examples.norm, fixed)
        first = jnp.where(begun.step == 0, size + norm, begun.size)
        size = jnp.minimum(size, _MUCH_LARGER * first)
        settled = norm <= _ROUNDING * float(jnp.finfo(size.dtype).eps) * size
        met = None
        if self.rtol is not None:
            met = norm <= self.atol + self.rtol * size
            settled = settled | met
        at = Applied(
            *(old, value, residual, norm, met, settled, examples),
            apply=lambda x: split_trainable(evaluate(x).value)[0],
        )
        output = StepOutput(
            monitor=jnp.max(norm),
            converged=None if met is None else jnp.all(met),
            model_state=out.state,
            aux=out.aux,
            stops=None if self.budget is None else begun.step + 1 >= self.budget,
        )
        return at, output, Begun(begun.step + 1, first)


class AbstractSingleMapSolver(AbstractFixedPointSolver):
    """A solver of fixed-point problems that applies the map once in each step, and takes no
    derivative of it: a linear map costs it one product in each step."""


class AbstractAcceleratedSolver(AbstractFixedPointSolver, AbstractBestIterateSolver):
    """A fixed-point solver whose steps go elsewhere than the map does, and may fail to come
    nearer: it answers with the best of its iterates."""

    @abc.abstractmethod
    def begin(self, params: Vector, examples: Examples) -> Any:
        """The memory of the method before its first step.

        **Arguments:**

        - `params`: the trainable part of the initial params.
        - `examples`: how many fixed points they hold.
        """

    @abc.abstractmethod
    def advance(self, at: Applied, memory: Any, progress: "Progress") -> tuple[Vector, Any]:
        """The next iterate.

        **Arguments:**

        - `at`: the map, applied where the steps so far have led.
        - `memory`: what `begin` or the step before returned.
        - `progress`: what came of the steps before this one.

        **Returns:**

        The new params, a vector, and the new memory.
        """

    def init(self, problem, params, hyper):
        examples = Examples.of(params, self.per_example)
        begun = Begun.at_start(params, examples)
        return begun, Progress.at_start(params, examples), self.begin(params, examples)

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        begun, progress, memory = solver_state
        at, output, begun = self.applied(
            problem, params, hyper, batch, key, model_state, begun
        )
        new, memory = self.advance(at, memory, progress)
        # The point whose residual is known to be small is the answer. Without a tolerance,
        # going on from there would combine rounding errors alone.
        new = at.examples.where(at.settled, at.params, new)
        static = split_trainable(params)[1]
        state = begun, progress.passed(at), memory
        return eqx.combine(new, static), state, output

    def conclude(self, params, solver_state, converged):
        _, progress, _ = solver_state
        best = jax.tree.map(
            lambda new, best: jnp.where(converged, new, best), params, progress.best
        )
        return best, mask_result(progress.stalls, RESULTS.inner_stagnation)


class Progress(eqx.Module):
    """The progress of the steps so far.

    **Attributes:**

    - `best`: the iterate with the smallest residual, for each fixed point.
    - `best_norm`: the norms of these residuals, of the shape of the examples.
    - `mark`, `mark_step`: the largest of these when it was last halved, and at which step.
    - `step`: the number of steps.
    """

    best: Vector
    best_norm: Array
    mark: FloatScalar
    mark_step: IntScalar
    step: IntScalar

    @classmethod
    def at_start(cls, params: Vector, examples: Examples) -> "Progress":
        """Before the first step."""
        dtype = tree_dtype(params)
        return cls(
            best=params,
            best_norm=jnp.full(examples.shape, jnp.inf, dtype),
            mark=jnp.full((), jnp.inf, dtype),
            mark_step=jnp.zeros((), int),
            step=jnp.zeros((), int),
        )

    def passed(self, at: Applied) -> "Progress":
        """After one more step."""
        better = at.norm < self.best_norm
        best_norm = jnp.where(better, at.norm, self.best_norm)
        largest = jnp.max(best_norm)
        halved = 2 * largest <= self.mark
        return Progress(
            best=at.examples.where(better, at.params, self.best),
            best_norm=best_norm,
            mark=jnp.where(halved, largest, self.mark),
            mark_step=jnp.where(halved, self.step, self.mark_step),
            step=self.step + 1,
        )

    @property
    def stalls(self) -> BoolScalar:
        """Whether the last half of the steps has not halved the residual."""
        return (2 * self.mark_step < self.step) & (self.step > _FEW_STEPS)


def as_budget(budget: Any) -> IntScalar | None:
    """A number of steps as an array, so that another one does not compile again."""
    if budget is None:
        return None
    array = jnp.asarray(budget)
    if array.ndim != 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            "`budget` must be an integer, or an integer array without axes; got "
            f"{budget!r}."
        )
    if not isinstance(array, jax.core.Tracer) and array < 1:
        raise ValueError(f"`budget` must be at least 1; got {budget!r}.")
    return array.astype(jnp.int32)


def check_relaxation(relaxation: float) -> None:
    """Raise a `ValueError` unless it lies in (0, 1]."""
    check_tolerance(relaxation, "relaxation", optional=False)
    if not 0 < relaxation <= 1:
        raise ValueError(f"`relaxation` must lie in (0, 1]; got {relaxation!r}.")
