"""Any optimistix solver as an inner solver."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

from .._core._results import RESULTS
from .._core._tree import split_trainable
from .._core._types import IntScalar, Params, Vector
from .._core._validate import check_count
from .._jaxpr._rewrite import carry_conditions
from .._problem import (
    AbstractFixedPointProblem,
    AbstractLeastSquaresProblem,
    AbstractProblem,
    Evaluation,
)
from ._base import AbstractDirectSolver
from ._common import direct_outcome, problem_optimality, refuse_state
from ._safe_loops import with_safe_loops


_Minimiser = optx.AbstractMinimiser
_LeastSquares = optx.AbstractLeastSquaresSolver
_RootFinder = optx.AbstractRootFinder
_FixedPoint = optx.AbstractFixedPointSolver


def _as_options(options: Any) -> Any:
    """Options whose numbers are arrays, so that other numbers do not compile again."""
    if options is None or callable(options):
        return options
    if not isinstance(options, dict):
        raise ValueError(
            "`options` must be a dictionary such as `{'lower': 0.0, 'upper': 1.0}`, or a "
            f"function `hyper -> dictionary`; got {options!r}."
        )
    numbers = (float, int, np.ndarray, np.generic)
    is_number = lambda x: isinstance(x, numbers) and not isinstance(x, bool)
    return jax.tree.map(lambda x: jnp.asarray(x) if is_number(x) else x, options)


class OptimistixSolver(AbstractDirectSolver):
    """Runs any optimistix minimiser, least-squares solver, root finder or fixed-point
    solver.

    Use it for smooth, deterministic problems that are to be solved to a tolerance, with
    [`metaopt.ImplicitAdjoint`][]. A root finder given a loss finds a zero of its
    gradient; given a fixed-point problem, a zero of `params - step(params)`. A solver of
    least squares, such as `LevenbergMarquardt`, needs a [`metaopt.LeastSquaresProblem`][].

    ```python
    import metaopt as mo
    import optimistix as optx

    mo.OptimistixSolver(optx.BFGS(rtol=1e-8, atol=1e-8))
    mo.OptimistixSolver(
        optx.Bisection(rtol=1e-8, atol=1e-8), options={"lower": 0.0, "upper": 1.0}
    )
    ```

    **Arguments:**

    - `solver`: the optimistix solver.
    - `max_steps`: the most steps it may take.
    - `options`: the `options` of the solver, a dictionary; or a function
        `hyper -> dictionary`. `Bisection` and `GoldenSearch` need `lower` and `upper`.

    **Raises:**

    `ValueError` where the solver does not fit the kind of the inner problem.
    """

    solver: Any
    max_steps: int = eqx.field(default=256, static=True)
    options: Any = eqx.field(default=None, converter=_as_options, kw_only=True)

    def __check_init__(self):
        known = (_Minimiser, _LeastSquares, _RootFinder, _FixedPoint)
        if not isinstance(self.solver, known):
            raise ValueError(
                "`solver` must be an optimistix solver such as `optimistix.BFGS(...)`; "
                f"got {self.solver!r}."
            )
        check_count(self.max_steps, "max_steps")

    def check(self, problem, data):
        data.check(1)
        refuse_state(self, problem)
        if problem.has_loss:
            fits = isinstance(self.solver, (_Minimiser, _RootFinder))
            want = "an optimistix minimiser such as `BFGS`, or a root finder"
            if isinstance(problem, AbstractLeastSquaresProblem):
                fits = fits or isinstance(self.solver, _LeastSquares)
            elif isinstance(self.solver, _LeastSquares):
                want += ", or write the loss as a `metaopt.LeastSquaresProblem`"
        elif isinstance(problem, AbstractFixedPointProblem):
            fits = True
            want = ""
        else:
            fits = not isinstance(self.solver, _FixedPoint)
            want = "an optimistix root finder such as `Newton`"
        if not fits:
            raise ValueError(
                f"`{type(self.solver).__name__}` cannot solve `{type(problem).__name__}`"
                f". Use {want}."
            )

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def solve(self, problem, params, hyper, batch, key, model_state):
        trainable, static = split_trainable(params)
        fixed = hyper, batch, key, model_state

        def evaluate(trainable):
            return problem.evaluate(eqx.combine(trainable, static), *fixed)

        entry, fn = self._stated(problem, params, evaluate, fixed)
        options = self.options
        if callable(options):
            options = _as_options(options(hyper))
        value, result, num_steps = self._run(entry, fn, trainable, options)
        return direct_outcome(
            problem,
            eqx.combine(value, static),
            evaluate(value),
            RESULTS.promote(result),
            num_steps,
        )

    def _stated(
        self,
        problem: AbstractProblem,
        params: Params,
        evaluate: Callable[[Vector], Evaluation],
        fixed: tuple[Any, ...],
    ) -> tuple[Callable[..., Any], Callable[[Vector, Any], Any]]:
        """The entry point of optimistix that fits the solver, and its function.

        **Arguments:**

        - `problem`, `params`: the inner problem and where it starts.
        - `evaluate`: evaluates the problem at the trainable part of the params.
        - `fixed`: `hyper`, the batch, the key and the model state.
        """
        static = split_trainable(params)[1]
        kind = self.solver
        if isinstance(problem, AbstractLeastSquaresProblem):
            if isinstance(kind, _LeastSquares):

                def residuals(y, _):
                    full = eqx.combine(y, static)
                    out, _ = problem.evaluate_predictions(full, *fixed)
                    return split_trainable(out)[0]

                return optx.least_squares, residuals
        if problem.has_loss and isinstance(kind, _Minimiser):
            return optx.minimise, lambda y, _: evaluate(y).value
        if isinstance(problem, AbstractFixedPointProblem) and isinstance(kind, _FixedPoint):
            return optx.fixed_point, lambda y, _: split_trainable(evaluate(y).value)[0]
        condition = self.optimality(problem, params, *fixed)
        constant = split_trainable(fixed[0])[0]
        # A solver that asks for structure (conjugate gradients inside Newton's method) is
        # told what the kind of the problem promises.
        entry = ft.partial(optx.root_find, tags=condition.tags)
        return entry, lambda y, _: condition(y, constant)

    def _run(
        self,
        entry: Callable[..., Any],
        fn: Callable[[Vector, Any], Any],
        trainable: Vector,
        options: Any,
    ) -> tuple[Vector, Any, IntScalar]:
        """Solve, with loops whose conditions read carried booleans and integers."""
        solver = with_safe_loops(self.solver)

        def run(trainable):
            solution = entry(
                fn,
                solver,
                trainable,
                options=options,
                max_steps=self.max_steps,
                throw=False,
            )
            return solution.value, solution.result, solution.stats["num_steps"]

        try:
            return carry_conditions(run)(trainable)
        except KeyError as error:
            name = error.args[0]
            if not isinstance(name, str) or name in (options or {}):
                raise
            raise ValueError(
                f"`optimistix.{type(self.solver).__name__}` needs the option `{name}`: "
                f"write `metaopt.OptimistixSolver(solver, options={{{name!r}: ...}})`."
            ) from error
