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

from .._core._results import RESULTS, where_result
from .._core._tree import split_trainable, tree_all_finite
from .._jaxpr._rewrite import carry_conditions
from .._problem import AbstractFixedPointProblem
from ._base import AbstractDirectSolver, Optimality
from ._common import direct_outcome, problem_optimality, refuse_state


_FUNCTION_NAMES = ("fun", "fixed_point_fun", "optimality_fun")
_SOLVED = 1  # `jaxopt.BoxOSQP.SOLVED`
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
    mo.JaxoptSolver(  # a quadratic program with inequality constraints only
        "OSQP",
        {"tol": 1e-8},
        arguments=lambda hyper, batch: {"params_obj": (Q, hyper), "params_ineq": (G, h)},
    )
    ```

    For quadratic programs `arguments` says what is solved, and the loss of the inner
    problem should be the same objective. Params are the primal and the dual variables,
    such as `jaxopt.base.KKTSolution(jnp.zeros(n), None, jnp.zeros(len(h)))` for the one
    above (after `import jaxopt.base`), where `None` stands for the duals of constraints
    that are not there.

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
        if not isinstance(self.solver, (str, type)):
            raise ValueError(
                "`solver` must be the name of a class in jaxopt, or the class, which "
                f"metaopt constructs with the inner problem; got {self.solver!r}."
            )
        cls = self._cls()
        # Solvers of quadratic programs make theirs when they are constructed.
        states_optimality = self._is_quadratic_program() or any(
            callable(vars(base).get("optimality_fun", None)) for base in cls.__mro__
        )
        if not states_optimality:
            raise ValueError(
                f"`jaxopt.{cls.__name__}` has no optimality condition, so its solution "
                "cannot be differentiated."
            )
        if cls.__name__ == "OSQP" and any(
            name.startswith("matvec_") for name in self.options
        ):
            raise ValueError(
                "`OSQP` takes matrices here, and no `matvec_...`. Use `BoxOSQP`."
            )
        if cls.__name__.startswith("Scipy"):
            raise ValueError(
                f"`jaxopt.{cls.__name__}` calls SciPy, which cannot be compiled. Use "
                "`LBFGS` or `LBFGSB`."
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
            conditions = _kkt_conditions
            if self._cls().__name__ != "OSQP":
                conditions = solver.optimality_fun
            return split_trainable(conditions(full, **arguments))[0]

        names = inspect.signature(self._cls()).parameters
        smooth = (
            problem.has_loss
            and "fun" in names
            and self.arguments is None
            and not any(name in names for name in _NON_SMOOTH)
        )
        return Optimality(residual, problem.tags if smooth else frozenset())

    def solve(self, problem, params, hyper, batch, key, model_state):
        # `KKTSolution` is a named tuple, and jaxopt may be absent: any subclass will do.
        is_named = isinstance(params, tuple) and type(params) is not tuple
        if self._is_quadratic_program() and not (is_named and len(params) == 3):
            raise ValueError(
                f"The params of `{self._cls().__name__}` are the primal and the dual "
                "variables, `jaxopt.base.KKTSolution(primal, dual_eq, dual_ineq)`; got "
                f"{type(params).__name__}."
            )

        def run(params):
            solver, arguments = self._build(problem, hyper, batch, key)
            solution, state = solver.run(params, **arguments)
            # `EqualityConstrainedQP` solves one linear system and has no state.
            fields = {} if state is None else state._asdict()
            if self._is_quadratic_program() and "status" in fields:
                converged = fields["status"] == _SOLVED
            elif "error" in fields and "tol" in vars(solver):
                converged = fields["error"] <= jnp.asarray(solver.tol)
            else:
                # A factorisation: it solves exactly or gives NaN.
                assert state is None, type(solver)
                converged = jnp.asarray(True)
            return solution, converged, jnp.asarray(fields.get("iter_num", 1))

        solution, converged, num_steps = carry_conditions(run)(params)
        finite = tree_all_finite(solution)
        result = where_result(converged, RESULTS.successful, RESULTS.inner_max_steps)
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

    def _is_quadratic_program(self) -> bool:
        return "matvec_Q" in inspect.signature(self._cls()).parameters

    def _function_name(self) -> str | None:
        if self._is_quadratic_program():  # its `fun` is a function of other arguments
            return None
        names = inspect.signature(self._cls()).parameters
        return next((name for name in _FUNCTION_NAMES if name in names), None)

    def _build(self, problem, hyper, batch, key) -> tuple[Any, dict[str, Any]]:
        def value(params):
            if name == "optimality_fun":
                return problem.optimality(params, hyper, batch, key, None)
            return problem.evaluate(params, hyper, batch, key, None).value

        cls = self._cls()
        options = dict(self.options)
        name = self._function_name()
        if name == "fixed_point_fun" and not isinstance(problem, AbstractFixedPointProblem):
            raise ValueError(
                f"`jaxopt.{cls.__name__}` solves fixed-point problems alone, not a "
                f"`{type(problem).__name__}`."
            )
        if name == "fun" and not problem.has_loss:
            raise ValueError(
                f"`jaxopt.{cls.__name__}` minimises a loss, and "
                f"`{type(problem).__name__}` has none."
            )
        if name is not None:
            options[name] = value
        names = inspect.signature(cls).parameters
        if "implicit_diff" in names:
            options["implicit_diff"] = False
        if "unroll" in names:
            # Without its implicit differentiation jaxopt would run all of `maxiter`.
            options.setdefault("unroll", False)
        arguments = {} if self.arguments is None else self.arguments(hyper, batch)
        _check_given(cls, cls, options, "options")
        solver = cls(**options)
        given = {"init_params": None, **arguments}
        _check_given(cls, solver.run, given, "arguments")
        if not self._is_quadratic_program():
            _check_given(cls, solver.init_state, given, "arguments")
        return solver, arguments


def _check_given(cls, function: Callable, given: dict[str, Any], source: str) -> None:
    """Raise a `ValueError` for an option that jaxopt requires and was not given."""
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in given
    ]
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing)
        raise ValueError(
            f"`jaxopt.{cls.__name__}` cannot run without {listed}. Give it in `{source}`, "
            "or use a solver that takes nothing but the loss, such as `LBFGS`."
        )


def _kkt_conditions(params, params_obj, params_eq=None, params_ineq=None):
    """The optimality of a quadratic program in the form of `jaxopt.OSQP`, which has none
    of its own: that the Lagrangian is stationary, that equalities hold, and that of each
    inequality either the multiplier is zero or the slack."""
    primal, dual_eq, dual_ineq = params
    quadratic, linear = params_obj
    stationarity = quadratic @ primal + linear
    feasibility = complementarity = None
    if params_eq is not None:
        matrix, target = params_eq
        stationarity = stationarity + matrix.T @ dual_eq
        feasibility = matrix @ primal - target
    if params_ineq is not None:
        matrix, bound = params_ineq
        stationarity = stationarity + matrix.T @ dual_ineq
        complementarity = dual_ineq * (matrix @ primal - bound)
    return type(params)(stationarity, feasibility, complementarity)
