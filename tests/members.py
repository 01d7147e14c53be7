"""Every member of every axis, for the tests that are about all of them.

Adding a member is adding a row. Each row is a function of a case of `problems.py`, so
that step sizes and tolerances fit it, and says what kinds of problem it serves.
"""

import dataclasses
import functools as ft
import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import optimistix as optx
import pytest

import metaopt as mo
from problems import Case, CASES, FIXED_POINT, GAME, LOSS, ROOT


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A row of a table.

    `make(case)` gives the same object each time, so that an equal call does not compile
    again. `num_terms` says which Neumann series a biased adjoint reproduces at the inner
    solution; `None` means that it is exact.
    """

    make: Callable[[Case], Any]
    serves: frozenset[str]
    num_terms: int | None = None
    needs: str | None = None  # a package that need not be installed

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        missing = self.needs is not None and not importlib.util.find_spec(self.needs)
        return [pytest.mark.skipif(missing, reason=f"{self.needs} is not installed")]


def _member(make: Callable[[Case], Any], *serves: str, **kwargs: Any) -> Member:
    return Member(ft.cache(make), frozenset(serves), **kwargs)


LINEAR_SOLVERS = {
    "CG": _member(lambda case: mo.CG(rtol=case.rtol), LOSS),
    "CG, diagonal": _member(
        lambda case: mo.CG(rtol=case.rtol, preconditioner=mo.linear.DiagonalEstimate(4)),
        LOSS,
    ),
    "CG, low rank": _member(
        lambda case: mo.CG(rtol=case.rtol, preconditioner=mo.linear.LowRank(2)), LOSS
    ),
    "MINRES": _member(lambda case: mo.linear.MINRES(rtol=case.rtol), LOSS),
    "GMRES": _member(lambda case: mo.GMRES(rtol=case.rtol), LOSS, FIXED_POINT, ROOT, GAME),
    "BiCGStab": _member(
        lambda case: mo.linear.BiCGStab(rtol=case.rtol), LOSS, FIXED_POINT, ROOT, GAME
    ),
    "NormalCG": _member(
        lambda case: mo.linear.NormalCG(rtol=case.rtol), LOSS, FIXED_POINT, ROOT, GAME
    ),
    "Dense": _member(lambda case: mo.Dense(), LOSS, FIXED_POINT, ROOT, GAME),
    "Anderson": _member(
        lambda case: mo.linear.LinearFixedPoint(mo.Anderson(rtol=case.rtol)), FIXED_POINT
    ),
    "Broyden": _member(
        lambda case: mo.linear.LinearFixedPoint(mo.Broyden(rtol=case.rtol)), FIXED_POINT
    ),
    "Neumann": _member(
        lambda case: mo.Neumann(num_terms=case.num_steps, scale=case.rate),
        LOSS,
        FIXED_POINT,
        GAME,
    ),
}

_ALONG_THE_PATH = {
    "unrolled": _member(lambda case: mo.UnrolledAdjoint(), LOSS, FIXED_POINT, GAME),
    "unrolled, steps made again": _member(
        lambda case: mo.UnrolledAdjoint(mo.memory.RecomputeSteps()), LOSS, FIXED_POINT, GAME
    ),
    "unrolled, updates kept": _member(
        lambda case: mo.UnrolledAdjoint(mo.memory.StoreUpdates()), LOSS, FIXED_POINT, GAME
    ),
    "unrolled, blocks made again": _member(
        lambda case: mo.UnrolledAdjoint(mo.memory.Blocks(2)), LOSS, FIXED_POINT, GAME
    ),
    "unrolled, checkpoints on the way": _member(
        lambda case: mo.UnrolledAdjoint(mo.memory.OnlineCheckpoints(5)),
        LOSS,
        FIXED_POINT,
        GAME,
    ),
    "forward": _member(lambda case: mo.ForwardAdjoint(), LOSS, FIXED_POINT, GAME),
    "truncated, whole length": _member(
        lambda case: mo.TruncatedAdjoint(case.num_steps), LOSS, FIXED_POINT, GAME
    ),
    "truncated": _member(
        lambda case: mo.TruncatedAdjoint(5), LOSS, FIXED_POINT, GAME, num_terms=4
    ),
    "one step": _member(
        lambda case: mo.OneStepAdjoint(), LOSS, FIXED_POINT, GAME, num_terms=0
    ),
}


def _implicit(linear: Member) -> Member:
    make = ft.cache(lambda case: mo.ImplicitAdjoint(linear.make(case)))
    return dataclasses.replace(linear, make=make)


ADJOINTS = _ALONG_THE_PATH | {
    f"implicit, {name}": _implicit(linear) for name, linear in LINEAR_SOLVERS.items()
}

SOLVERS = {
    "descent": _member(
        lambda case: mo.Descent(optax.sgd(case.rate), case.num_steps), LOSS, GAME
    ),
    "momentum": _member(
        lambda case: mo.Descent(optax.sgd(case.rate, 0.25), case.num_steps), LOSS, GAME
    ),
    "reversible": _member(
        lambda case: mo.ReversibleSGD(case.rate, 0.25, case.num_steps), LOSS
    ),
    "picard": _member(
        lambda case: mo.Picard(num_steps=case.num_steps, rtol=None), FIXED_POINT
    ),
    "reversible picard": _member(
        lambda case: mo.ReversiblePicard(case.num_steps, relaxation=0.9), FIXED_POINT
    ),
    "anderson": _member(lambda case: mo.Anderson(rtol=case.rtol), FIXED_POINT),
    "broyden": _member(lambda case: mo.Broyden(rtol=case.rtol), FIXED_POINT),
    "newton krylov": _member(lambda case: mo.NewtonKrylov(rtol=case.rtol), FIXED_POINT),
    "minimiser": _member(
        lambda case: mo.OptimistixSolver(optx.BFGS(rtol=case.rtol, atol=case.rtol)), LOSS
    ),
    "root finder": _member(
        lambda case: mo.OptimistixSolver(optx.Newton(rtol=case.rtol, atol=case.rtol)),
        LOSS,
        FIXED_POINT,
        ROOT,
        GAME,
    ),
    "fixed-point solver": _member(
        lambda case: mo.OptimistixSolver(optx.FixedPointIteration(rtol=1e-13, atol=1e-13)),
        FIXED_POINT,
    ),
    "jaxopt lbfgs": _member(
        lambda case: mo.JaxoptSolver("LBFGS", {"tol": 1e-12, "maxiter": 200}),
        LOSS,
        needs="jaxopt",
    ),
    "jaxopt anderson": _member(
        lambda case: mo.JaxoptSolver("AndersonAcceleration", {"tol": 1e-12}),
        FIXED_POINT,
        needs="jaxopt",
    ),
    "jaxopt broyden": _member(
        lambda case: mo.JaxoptSolver("Broyden", {"tol": 1e-12}), ROOT, GAME, needs="jaxopt"
    ),
}


def inner_solver(case: Case) -> mo.extend.AbstractSolver:
    """One that every adjoint for this kind of problem can serve: by steps, if any is."""
    return SOLVERS[case.solvers[0]].make(case)


def rows_and_cases(table: dict[str, Member]) -> list[Any]:
    """Each row of a table with each case that it serves, as parameters for pytest."""
    return [
        pytest.param(row, case, id=f"{row}-{case}", marks=member.marks)
        for row, member in table.items()
        for case in CASES
        if CASES[case](jnp.float64).kind in member.serves
    ]


ELSEWHERE = {
    # Adjoints: of a solver of their own, and one whose gradient is meant to be another.
    "ReversibleAdjoint": "test_reversible.py",
    "FirstOrderAdjoint": "test_first_order.py",
    # Takes no step, and needs params that are a solution.
    "Solved": "test_pay_for_what_is_read.py",
    # Linear solvers and preconditioners that need the state of a solver of their own.
    "SHINE": "test_fixed_points.py",
    "SecondMoment": "test_preconditioners.py",
    # Problems that are another kind, written otherwise.
    "InChunks": "test_chunks.py",
    "LeastSquaresProblem": "test_wrapped_solvers.py",
    "PredictionProblem": "test_gauss_newton.py",
    "GaussNewton": "test_gauss_newton.py",
    # Bounds ask for constants of the problem.
    "StrongConvexity": "test_error.py",
    # Members of the outer loop are no part of one hypergradient.
    "NestedSolver": "test_run.py",
    "SelfTuningSolver": "test_self_tuning.py",
    "ColdStart": "test_compiled_once.py",
    "WarmStart": "test_run.py",
    "Windows": "test_windows.py",
    "GeometricTolerance": "test_tolerance.py",
    "PolynomialTolerance": "test_tolerance.py",
    "Checkpoint": "test_callbacks.py",
    "KeepBest": "test_callbacks.py",
    "Log": "test_callbacks.py",
    "Progress": "test_callbacks.py",
    "RollBack": "test_roll_back.py",
    "StopEarly": "test_callbacks.py",
    # The cases hold their data whole, and no model state.
    "BatchSequence": "test_agreement.py",
    "FullBatch": "test_bad_input.py",
    "Minibatches": "test_agreement.py",
    "Folds": "test_lanes.py",
    "DrawnBatches": "test_cursors.py",
    "CarriedState": "test_agreement.py",
    "FrozenState": "test_agreement.py",
    "PerStepState": "test_few_shot.py",
}
"""Public members that stand in none of the tables, and the module that tests them."""
