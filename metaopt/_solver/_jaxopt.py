"""Any jaxopt solver with an optimality condition as an inner solver.

jaxopt is no longer maintained. It is here for what exists nowhere else in JAX:
constrained and non-smooth inner problems. It is imported only when used, its gradients
are never used (ours come from its optimality condition), and its loops are rebuilt so
that they cannot hang under `jax.vmap`.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._problem import AbstractFixedPointProblem, AbstractInnerProblem
from .._results import RESULTS, where_result
from .._rewrite import carry_conditions
from .._tree import split_trainable, tree_all_finite
from ._base import AbstractDirectSolver, Optimality
from ._common import problem_optimality
from ._optimistix import direct_outcome, refuse_state


_FUNCTION_NAMES = ("fun", "fixed_point_fun", "optimality_fun")
_NON_SMOOTH = ("prox", "block_prox", "projection", "projection_grad")


class JaxoptSolver(AbstractDirectSolver):
    """Runs any jaxopt solver that has an optimality condition.

    Use it for constrained and non-smooth inner problems (lasso, elastic net, boxes,
    simplices, quadratic programs), with [`metaopt.ImplicitAdjoint`][] and a linear
    solver for non-symmetric systems, such as `metaopt.GMRES()`. For smooth,
    unconstrained problems prefer [`metaopt.OptimistixSolver`][], which is maintained.

    <!-- no-test: jaxopt may be absent -->
    ```python
    import jax.numpy as jnp, jaxopt
    import metaopt as mo

    mo.JaxoptSolver("LBFGS", {"tol": 1e-8})
    mo.JaxoptSolver(  # lasso; `hyper` reaches the proximal operator
        "ProximalGradient",
        {"prox": jaxopt.prox.prox_lasso, "tol": 1e-10},
        arguments=lambda hyper, batch: {"hyperparams_prox": jnp.exp(hyper)},
    )
    mo.JaxoptSolver(  # a quadratic program; params are the primal and dual variables
        "OSQP",
        arguments=lambda hyper, batch: {"params_obj": (Q, hyper), "params_ineq": (G, h)},
    )
    ```

    **Arguments:**

    - `solver`: the name of a class in jaxopt, or the class. By name, jaxopt is imported
        for you and its deprecation warning is contained.
    - `options`: what the class is constructed with, besides the function, which comes
        from the inner problem.
    - `arguments`: `arguments(hyper, batch)` returns a dictionary of what the solver's
        `run` and `optimality_fun` take besides params. They are differentiated.

    **Raises:**

    `ImportError` where jaxopt is not installed; `ValueError` where there is no such
    solver or it has no optimality condition.
    """

    solver: Any
    options: dict[str, Any] = eqx.field(default_factory=dict)
    arguments: Callable[..., dict[str, Any]] | None = None

    def __check_init__(self):
        cls = self._cls()
        if not callable(vars(cls).get("optimality_fun", None)) and not any(
            callable(vars(base).get("optimality_fun", None)) for base in cls.__mro__
        ):
            raise ValueError(
                f"`jaxopt.{cls.__name__}` has no optimality condition, so its solution "
                "cannot be differentiated."
            )
        for name in (*_FUNCTION_NAMES, "implicit_diff", "has_aux"):
            if name in self.options:
                raise ValueError(
                    f"`options` must not hold `{name}`, which metaopt sets from the "
                    "inner problem."
                )

    def check(self, problem, data):
        data.check(1)
        refuse_state(self, problem)

    def optimality(self, problem, params, hyper, batch, key, state):
        if self._function_name() == "fixed_point_fun":
            # jaxopt's own has the other sign, for which a Neumann series diverges.
            return problem_optimality(problem, params, hyper, batch, key, state)
        static_params = split_trainable(params)[1]
        static_hyper = split_trainable(hyper)[1]

        def residual(params, hyper):
            full = eqx.combine(params, static_params)
            hyper = eqx.combine(hyper, static_hyper)
            solver, arguments = self._build(problem, hyper, batch, key)
            return split_trainable(solver.optimality_fun(full, **arguments))[0]

        names = inspect.signature(self._cls()).parameters
        smooth = (
            isinstance(problem, AbstractInnerProblem)
            and "fun" in names
            and self.arguments is None
            and not any(name in names for name in _NON_SMOOTH)
        )
        return Optimality(residual, problem.tags if smooth else frozenset())

    def solve(self, problem, params, hyper, batch, key, model_state):
        takes_function = self._function_name() is not None

        def run(params):
            solver, arguments = self._build(problem, hyper, batch, key)
            # Solvers of quadratic programs start from zero; their params hold the dual
            # variables as well, which `init` knows nothing of.
            start = params if takes_function else None
            solution, state = solver.run(start, **arguments)
            error = state._asdict().get("error", jnp.asarray(0.0))
            tolerance = vars(solver).get("tol", jnp.inf)
            return solution, error, state.iter_num, jnp.asarray(tolerance)

        solution, error, num_steps, tolerance = carry_conditions(run)(params)
        finite = tree_all_finite(solution)
        result = where_result(
            error <= tolerance, RESULTS.successful, RESULTS.inner_max_steps
        )
        result = where_result(finite, result, RESULTS.inner_nonfinite)
        evaluation = None
        if problem.has_aux:
            evaluation = problem.evaluate(solution, hyper, batch, key, model_state)
        return direct_outcome(problem, solution, evaluation, result, num_steps)

    def _cls(self) -> Any:
        if not isinstance(self.solver, str):
            return self.solver
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                module = importlib.import_module("jaxopt")
        except ImportError as error:
            raise ImportError(
                "`metaopt.JaxoptSolver` needs jaxopt: `pip install jaxopt`."
            ) from error
        if self.solver not in vars(module):
            raise ValueError(f"jaxopt has no solver named {self.solver!r}.")
        return vars(module)[self.solver]

    def _function_name(self) -> str | None:
        names = inspect.signature(self._cls()).parameters
        return next((name for name in _FUNCTION_NAMES if name in names), None)

    def _build(self, problem, hyper, batch, key) -> tuple[Any, dict[str, Any]]:
        def value(params):
            return problem.evaluate(params, hyper, batch, key, None).value

        cls = self._cls()
        options = dict(self.options)
        name = self._function_name()
        if name == "fixed_point_fun" and not isinstance(problem, AbstractFixedPointProblem):
            raise ValueError(
                f"`jaxopt.{cls.__name__}` solves fixed-point problems, and "
                f"`{type(problem).__name__}` is none."
            )
        if name is not None:
            options[name] = value
        if "implicit_diff" in inspect.signature(cls).parameters:
            options["implicit_diff"] = False
        arguments = {} if self.arguments is None else self.arguments(hyper, batch)
        return cls(**options), arguments
